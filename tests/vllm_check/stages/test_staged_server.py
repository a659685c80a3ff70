"""vLLM's OpenAI-compatible server with pruning between the layers, and a client of OpenAI's."""

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import openai
import staged
from served import answers, chat, image_part, serving

METHOD = "pyramiddrop:2=0.5,4=0.1,6=0.02"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    options = [
        *("--additional-config", json.dumps({"vtp": {"method": METHOD}})),
        *("--scheduler-cls", staged.OPTIONS["scheduler_cls"], "--no-enable-chunked-prefill"),
        *("--logits-processors", *staged.OPTIONS["logits_processors"]),
        *("--max-num-batched-tokens", 2048, "--max-num-seqs", 16),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    program = (Path(__file__).with_name("server_v2.py"),)
    with serving(log, *options, program=program) as client:
        client.log = log
        yield client


def test_many_at_once_are_answered_as_offline(client):
    """64 requests wait at once, text-only ones among them."""
    cases = asking.cases(64)
    engine = staged.llm(METHOD)
    requests = [asking.request(case, images=int(n % 8 > 0)) for n, case in enumerate(cases)]
    outputs = asking.ask(engine, requests)
    calls = [
        (case, image_part(asking.picture(case)) if n % 8 else None, {})
        for n, case in enumerate(cases)
    ]
    texts, lengths = answers(client, calls, at_once=64)
    assert texts == [asking.answer(output) for output in outputs]
    assert lengths == [len(output.prompt_token_ids) for output in outputs]


def test_what_cannot_be_served_is_told_and_the_server_goes_on(client):
    case, other = asking.cases(66)[64:]
    part = image_part(asking.picture(case))
    refused = {
        "prompt_logprobs: expected None": [
            {"prompt_logprobs": 1},
            {"echo": True, "logprobs": True, "top_logprobs": 1},
        ],
        "use_beam_search: expected False": [{"use_beam_search": True, "n": 2}],
    }
    for message, asked in refused.items():
        for more in asked:
            with pytest.raises(openai.BadRequestError, match=message):
                chat(client, case, part, **more)
    assert "cannot be served" not in client.log.read_text()  # refused before any work
    assert chat(client, other, image_part(asking.picture(other))).choices[0].message.content
    # After any client's error vLLM takes its engine to have the image, and asks for it once more.
    with pytest.raises(openai.InternalServerError):
        chat(client, case, part)
    assert chat(client, case, part).choices[0].message.content
