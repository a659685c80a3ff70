"""The small LLaVA in vLLM: as it is, and with images that keep some of their tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import torch
from transformers import LlavaForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels import vllm as plugin
from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.pocket_llava.model import TRAINED, processor

PATCHES = 256
BUDGETS = [
    (None, None),
    (256, "attention"),
    (96, "attention"),
    (96, "similarity"),
    (40, "attention"),
    (0.375, "attention"),  # 96, too
    (96, "divprune"),
]


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(TRAINED)


def transformers_answers(model, method, count):
    cases, found = asking.cases(count), []
    for first in range(0, count, 20):
        batch = cases[first : first + 20]
        pictures = [asking.picture(case) for case in batch]
        inputs = chat_inputs(processor(), pictures, [case.question.text for case in batch])
        with vtp.prune(model, method, positions="contiguous"):
            found += greedy_answers(model, processor(), inputs, asking.LONGEST_ANSWER)
    return found


def assert_same(ours, theirs):
    """The same prompts and answers; probabilities as near as batches of other sizes leave them."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert asking.tokens(a) == asking.tokens(b)
        difference = torch.tensor(asking.logprobs(a)) - torch.tensor(asking.logprobs(b))
        assert difference.abs().max() < 1e-3


def keys(engine, image, keep, score):
    """What vLLM's caches know an image by."""
    processor = engine.llm_engine.renderer.get_mm_processor()
    given = asking.budget(keep, score).get("mm_processor_kwargs")
    items = processor.info.parse_mm_data({"image": image})
    return processor("<image>", items, hf_processor_mm_kwargs=given)["mm_hashes"]["image"]


# ---- off --------------------------------------------------------------------------------------


def test_without_a_budget_answers_are_those_of_vllm_alone(engine, old_names):
    """To the last bit; of a checkpoint that vLLM alone can load, and of one that it cannot."""
    script = Path(asking.__file__).with_name("plain.py")
    environment = os.environ | {"VLLM_PLUGINS": "none"}
    run = subprocess.run(
        [sys.executable, script, old_names, "20"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    plain = json.loads(run.stdout.splitlines()[-1])
    assert plain["class"].startswith("vllm.model_executor.models.llava.")
    asking.forget(engine)
    requests = [asking.request(case) for case in asking.cases(20)]
    for found in (asking.ask(engine, requests), asking.ask(asking.llm(old_names), requests)):
        ours = [[o.prompt_token_ids, asking.tokens(o), asking.logprobs(o)] for o in found]
        assert ours == plain["outputs"]


# ---- fixed budgets ----------------------------------------------------------------------------


METHODS = {
    "attention": lambda keep: vtp.VisPruner(keep, important=1.0, per="picture"),
    "similarity": lambda keep: vtp.InflectionPruning(min_keep=keep, max_keep=keep, llm_layers=()),
    "divprune": lambda keep: vtp.DivPrune(keep, per="picture"),
}


@pytest.mark.parametrize(
    ("keep", "score", "more", "same"),
    [
        (40, "attention", {}, 40),
        (128, "similarity", {}, 128),
        (0.25, "divprune", {}, 0.25),
        (0.75, "attention", {"at_most": 128}, 0.5),
    ],
)
def test_answers_are_those_of_transformers(engine, model, keep, score, more, same):
    count = 100
    theirs = transformers_answers(model, METHODS[score](same), count)
    cases = asking.cases(count)
    budget = asking.budget(keep, score, **more)
    outputs = asking.ask(engine, [asking.request(case, **budget) for case in cases])
    assert [asking.answer(output) for output in outputs] == theirs
    image = model.config.image_token_id
    kept = vtp.methods.budget.visual_budget(same, PATCHES)
    assert {output.prompt_token_ids.count(image) for output in outputs} == {kept}


def test_budgets_do_not_share_cache_entries(engine):
    cases = asking.cases(6)
    alone = {}
    for keep, score in BUDGETS:
        asking.forget(engine)
        requests = [asking.request(case, **asking.budget(keep, score)) for case in cases]
        alone[keep, score] = asking.ask(engine, requests)
    # The same tokens of the prompt, other images: only their keys tell these two apart.
    first, second = alone[96, "attention"], alone[96, "similarity"]
    assert [o.prompt_token_ids for o in first] == [o.prompt_token_ids for o in second]
    assert [asking.logprobs(o) for o in first] != [asking.logprobs(o) for o in second]
    asking.forget(engine)
    for again in range(3):  # one after the other, then from what is cached
        for keep, score in BUDGETS:
            requests = [asking.request(case, **asking.budget(keep, score)) for case in cases]
            found = asking.ask(engine, requests)
            assert_same(found, alone[keep, score])
            cached = [output.num_cached_tokens for output in found]
            assert all(cached) if again else not any(cached)
    image = asking.picture(cases[0])
    found = [keys(engine, image, keep, score)[0] for keep, score in BUDGETS]
    assert len(set(found)) == len(BUDGETS)
    assert keys(engine, image, 1, "attention") != keys(engine, image, 1.0, "attention")


def test_budgets_meet_in_one_batch(engine):
    """With one image, several or none, each as if it were alone."""
    cases = asking.cases(15)
    requests = [
        asking.request(case, images=n % 4, **(asking.budget(*BUDGETS[n % 7]) if n % 4 else {}))
        for n, case in enumerate(cases)
    ]
    asking.forget(engine)
    together = asking.ask(engine, requests)
    alone = []
    for request in requests:
        asking.forget(engine)
        alone += asking.ask(engine, [request])
    assert_same(together, alone)
    image = 4
    for n, output in enumerate(together):
        keep = BUDGETS[n % 7][0] or 1.0
        rows = (n % 4) * plugin.Budget(keep).rows(PATCHES)
        assert output.prompt_token_ids.count(image) == rows


def test_all_tokens_kept_is_nothing_pruned(engine):
    cases = asking.cases(6)
    asking.forget(engine)
    dense = asking.ask(engine, [asking.request(case) for case in cases])
    kept = [asking.request(case, **asking.budget(PATCHES)) for case in cases]
    assert_same(asking.ask(engine, kept), dense)


def test_an_engine_with_a_budget(engine, monkeypatch):
    """All requests have it, and may lower it. Prompts are read in pieces that cut images up."""
    settings = asking.budget(64)
    small = asking.llm(max_num_batched_tokens=48, max_num_seqs=8, **settings)
    cases = asking.cases(10)
    asking.forget(engine)
    expected = asking.ask(engine, [asking.request(case, **settings) for case in cases])
    assert_same(asking.ask(small, [asking.request(case) for case in cases]), expected)
    lower = [asking.request(case, images=2, **asking.budget(40)) for case in cases]
    assert_same(asking.ask(small, lower), asking.ask(engine, lower))
    image = asking.picture(cases[0])
    assert keys(small, image, None, None) != keys(engine, image, None, None)
    assert keys(small, image, 40, "attention") != keys(small, image, None, None)
    for given, message in (
        (asking.budget(65), "more than the engine's 64 of the 256 .* got 65"),
        (asking.budget(0.5), "more than the engine's 64 of the 256 .* got 128"),
        ({"mm_processor_kwargs": {"images_kwargs": {"vtp": None}}}, "got all tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            asking.ask(small, [asking.request(cases[0], **given)])
    assert_same(asking.ask(small, [asking.request(case) for case in cases]), expected)
    # As numbers a count of 1 and all tokens are equal.
    info = small.llm_engine.renderer.get_mm_processor().info
    monkeypatch.setattr(info, "budget", plugin.Budget(1))
    with pytest.raises(ValueError, match=r"more than the engine's 1 of the 256 .* got 256"):
        info.budget_for(asking.budget(1.0)["mm_processor_kwargs"])


# ---- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": PATCHES + 1}, "at most 256 tokens, got 257"),
        ({"keep": 0}, "vtp.keep: expected at least 1"),
        ({"keep": 0.5, "score": "cdpruner"}, "'cdpruner' looks at all text"),
        ({"keep": 64, "score": "norm"}, "vtp.score"),
        ({"keep": 64, "layer": 2}, "there is no layer"),
    ],
)
def test_bad_settings_are_refused(engine, settings, message):
    """Of an engine before it loads anything; of a request before it is taken."""
    given = {"mm_processor_kwargs": {"images_kwargs": {"vtp": settings}}}
    with pytest.raises(RuntimeError, match=message):
        asking.llm(load_format="no such format", **given)
    case = asking.cases(1)[0]
    with pytest.raises(ValueError, match=message):
        asking.ask(engine, [asking.request(case, **given)])
    assert asking.answer(asking.ask(engine, [asking.request(case)])[0])


def test_a_budget_without_the_plugin_is_an_error_and_not_forgotten(old_names):
    environment = os.environ | asking.ENVIRONMENT | {"VLLM_PLUGINS": "none"}
    code = f"import asking; asking.llm({str(old_names)!r}, **asking.budget(64))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "Failed to apply LlavaProcessor" in run.stderr and "'vtp'" in run.stderr


def test_adapters_of_the_tower_are_refused():
    from vtp_kernels.vllm.llava import PrunedLlava

    lora = SimpleNamespace(enable_tower_connector_lora=True)
    config = SimpleNamespace(lora_config=lora, additional_config={})
    with pytest.raises(NotImplementedError, match="enable_tower_connector_lora"):
        PrunedLlava(vllm_config=config)


def test_pruning_between_layers_by_model_runner_v1_is_refused():
    """It is tested in processes that have V2."""
    settings = {"additional_config": {"vtp": {"method": "fastv:2:0.5"}}}
    with pytest.raises(NotImplementedError, match="set VLLM_USE_V2_MODEL_RUNNER=1"):
        asking.llm(load_format="dummy", **settings)


# ---- embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["attention", "similarity"])
def test_embeddings_of_as_many_tokens_as_each_image_needs(engine, model, source):
    count = 40
    method = vtp.InflectionPruning(source=source, rule="mass", mass=0.8, llm_layers=())
    theirs = transformers_answers(model, method, count)
    cases = asking.cases(count)
    embeddings = plugin.encode(
        [asking.picture(case) for case in cases], model_encoder(model), method
    )
    assert len({len(rows) for rows in embeddings}) > 5
    requests = [
        asking.request(case, images=[rows]) for case, rows in zip(cases, embeddings, strict=True)
    ]
    outputs = asking.ask(engine, requests)
    assert [asking.answer(output) for output in outputs] == theirs
    image = model.config.image_token_id
    lengths = [output.prompt_token_ids.count(image) for output in outputs]
    assert lengths == [len(rows) for rows in embeddings]


def model_encoder(model):
    return plugin.Encoder(model, processor())
