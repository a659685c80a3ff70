"""vLLM's OpenAI-compatible server with a budget, on this machine alone, and a client of OpenAI's.

The server has the engine in a process of its own: the settings get there.
"""

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import openai
from served import answers, chat, embeddings_part, image_part, serving

import vtp_kernels as vtp
from vtp_kernels import vllm as plugin
from vtp_kernels.pocket_llava.model import TRAINED

KEEP = 96


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    settings = json.dumps(asking.budget(KEEP)["mm_processor_kwargs"])
    options = ("--mm-processor-kwargs", settings, "--trust-request-mm-kwargs", "--enable-mm-embeds")
    with serving(tmp_path_factory.mktemp("server") / "log", *options) as client:
        yield client


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
