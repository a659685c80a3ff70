"""Small models with random weights that cut pictures up, in vLLM: InternVL and LLaVA-OneVision."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import numpy as np
import plain_tiles
import torch
from in_both import METHODS, Tiles, assert_no_entry_is_shared, assert_same
from tiny_next import drawing

from vtp_kernels import reference
from vtp_kernels.models.families import FAMILIES
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch
from vtp_kernels.vllm.budget import Budget


@pytest.fixture(scope="module", params=["tiny_internvl", "tiny_internvl_chat", "tiny_onevision"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Tiles(request.param, folder, **plain_tiles.SETTINGS)


def in_another_process(served, *settings, **variables):
    script = plain_tiles.__file__
    command = [sys.executable, script, served.tiny.__name__, served.folder, *settings]
    environment = os.environ | asking.ENVIRONMENT | variables
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_without_a_budget_answers_are_those_of_vllm_alone(served):
    plain = in_another_process(served, VLLM_PLUGINS="none")
    assert plain["module"].startswith("vllm.model_executor.models.")
    asking.forget(served.engine)
    assert plain_tiles.answers(served.engine, served.tiny) == plain["outputs"]


V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}  # before Triton is imported


@pytest.mark.parametrize(
    ("settings", "variables"),
    [({"tensor_parallel_size": 2}, {}), ({}, V2)],
    ids=["two ranks", "model runner V2"],
)
def test_two_ranks_and_model_runner_v2_say_the_same(served, settings, variables):
    budget = asking.budget(0.4)
    found = in_another_process(served, json.dumps(settings | budget), **variables)
    assert found["module"].startswith("vtp_kernels.vllm.")
    asking.forget(served.engine)
    expected = plain_tiles.answers(served.engine, served.tiny, **budget)
    for ours, theirs in zip(found["outputs"], expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=1e-3)


@torch.no_grad()
def rows_that_stay(served, picture, budget):
    """By what transformers' tower saw, and a choice with torch alone."""
    base = served.model.model
    tower = FAMILIES[served.tiny.FAMILY].tower(base)
    _, inputs = served.inputs([picture])
    watch = VisionWatch(base, tower, "attention", backend="reference")
    watch.attach()
    try:
        output = base.get_image_features(**inputs)
    finally:
        watch.detach()
    dense, seen = output.pooler_output, getattr(output, SEEN)
    dense = torch.cat(list(dense)).flatten(0, -2)
    keep = budget.rows(len(dense))
    if budget.score == "divprune":
        return dense[reference.select_diverse(dense[None], keep).indices[0]]
    scores = seen.attention
    if budget.score == "similarity":
        whole = seen.summary[:, None]
        scores = torch.nn.functional.cosine_similarity(seen.features, whole, dim=-1)
    flat = scores.flatten().tolist()
    ranked = [-flat[token] if token >= 0 else torch.inf for token in seen.shows.tolist()]
    return dense[sorted(sorted(range(len(dense)), key=ranked.__getitem__)[:keep])]


@pytest.mark.parametrize("score", ["attention", "similarity", "divprune"])
@pytest.mark.parametrize("keep", [10, 0.4, 0.95])
def test_rows_that_stay(served, keep, score):
    budget = Budget(keep, score)
    for picture in served.pictures():
        tokens, kwargs = served.processed([picture], **asking.budget(keep, score))
        found, expected = served.embedded(kwargs), rows_that_stay(served, picture, budget)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert tokens.count(served.model.config.image_token_id) == len(expected)


@pytest.mark.parametrize("score", list(METHODS))
@pytest.mark.parametrize(("keep", "more"), [(12, {}), (0.3, {}), (0.75, {"at_most": 12})])
def test_answers_are_those_of_transformers(served, keep, more, score):
    """One picture or several in a prompt, prompts that are read in pieces, and a second turn."""
    budget = asking.budget(keep, score, **more)
    method = METHODS[score](12 if more else keep)
    some = [served.pictures(n, n + 1) for n in range(4)] + [served.pictures(0, 2)]
    asking.forget(served.engine)
    outputs = asking.ask(served.engine, [served.request(x, **budget) for x in some])
    answers = [served.in_transformers(pictures, method) for pictures in some]
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)
    text = " ".join(["7 8", *map(str, answers[0][0]), "9 10"])
    (again,) = asking.ask(served.engine, [served.request(some[0], text, **budget)])
    assert_same(again, served.in_transformers(some[0], method, text))


def test_budgets_meet_in_one_batch_and_share_no_cache_entry(served):
    budgets = [{}, asking.budget(12), asking.budget(12, "divprune"), asking.budget(0.3)]
    assert_no_entry_is_shared(served, budgets)


@pytest.mark.parametrize("served", ["tiny_internvl", "tiny_onevision"], indirect=True)
def test_videos_keep_all_their_tokens(served):
    """Alone, and beside an image that does not."""
    frames = np.stack([np.asarray(drawing((112, 112), seed)) for seed in range(3)])
    alone = {"prompt": "5 <video> 7 8", "multi_modal_data": {"video": [frames]}}
    (picture,) = served.pictures(0, 1)
    beside = {
        "prompt": f"5 <video> 6 {served.tiny.PLACEHOLDER} 7 8",
        "multi_modal_data": {"video": [frames], "image": [picture]},
    }
    found = []
    for budget in ({}, asking.budget(12), asking.budget(1.0)):
        asking.forget(served.engine)
        found.append(asking.ask(served.engine, [alone | budget, beside | budget]))
    (video, dense), (same, pruned), (also, everything) = found
    for ours, theirs in ((same, video), (also, video), (everything, dense)):
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        assert_same(ours, (asking.tokens(theirs), asking.logprobs(theirs)))
    image = served.model.config.image_token_id
    shown = [x for x in pruned.prompt_token_ids if x != image]
    assert shown == [x for x in dense.prompt_token_ids if x != image]
    assert pruned.prompt_token_ids.count(image) == 12 < dense.prompt_token_ids.count(image)


@pytest.mark.parametrize("served", ["tiny_internvl_chat"], indirect=True)
def test_graphs_and_ranks_that_share_tiles_do_not_go_past_the_choice(served):
    """vLLM has these for the first format of InternVL's checkpoints alone."""
    found = served.engine.apply_model(lambda model: model.get_encoder_cudagraph_config())
    assert found[0].modalities == ["video"]
    settings = {"load_format": "dummy", "mm_encoder_tp_mode": "data", **asking.budget(12)}
    with pytest.raises(NotImplementedError, match="no rank sees the attention in all tiles"):
        asking.llm(served.folder, **settings)
