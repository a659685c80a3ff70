"""Small models with M-RoPE in vLLM (model runner V2): as they are, and with images that keep some
of their tokens, against transformers with the same rows gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import plain_grids
import plain_tiles
import ranks_grids
import tiny_grids
from in_both import METHODS, Grids, assert_no_entry_is_shared, assert_same
from tiny_next import IMAGE

from vtp_kernels.vllm.budget import Budget


@pytest.fixture(scope="module", params=list(tiny_grids.FAMILIES))
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Grids(request.param, folder, **plain_tiles.SETTINGS)


def test_without_a_budget_answers_are_those_of_vllm_alone(served):
    command = [sys.executable, Path(plain_grids.__file__), served.name, served.folder]
    environment = os.environ | {"VLLM_PLUGINS": "none"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plain = json.loads(run.stdout.splitlines()[-1])
    assert plain["module"].startswith("vllm.model_executor.models.")
    asking.forget(served.engine)
    assert plain_tiles.answers(served.engine, served.tiny) == plain["outputs"]


@pytest.mark.parametrize(
    ("keep", "more", "score"),
    [
        (12, {}, "attention"),
        (0.3, {}, "attention"),
        (0.9, {"at_most": 6}, "attention"),
        (0.3, {}, "divprune"),
    ],
)
def test_answers_are_those_of_transformers(served, keep, more, score):
    """Wide and tall, one picture or two, prompts read in pieces of 48, and a second turn."""
    budget = asking.budget(keep, score, **more)
    method = METHODS[score](more.get("at_most", keep))
    some = [served.pictures(n, n + 1) for n in range(4)] + [served.pictures(0, 2)]
    asking.forget(served.engine)
    outputs = asking.ask(served.engine, [served.request(x, **budget) for x in some])
    answers = [served.in_transformers(pictures, method) for pictures in some]
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)
    rows = [Budget(keep, score, **more).rows(squares(served, picture)) for picture in some[-1]]
    assert outputs[-1].prompt_token_ids.count(IMAGE) == sum(rows)
    text = " ".join(["7 8", *map(str, answers[-1][0]), "9 10"])
    (again,) = asking.ask(served.engine, [served.request(some[-1], text, **budget)])
    assert_same(again, served.in_transformers(some[-1], method, text))


def squares(served, picture):
    return int(served.processor.image_processor([picture])["image_grid_thw"][0].prod()) // 4


def test_budgets_meet_in_one_batch_and_share_no_cache_entry(served):
    budgets = [{}, asking.budget(12), asking.budget(12, "similarity"), asking.budget(0.3)]
    assert_no_entry_is_shared(served, budgets)


@pytest.mark.parametrize("served", ["qwen2_vl"], indirect=True)
def test_a_video_beside_pruned_images_is_as_it_was(served):
    """It has fewer tokens than the budget leaves, and so keeps them all in transformers."""
    film = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    pictures, place = served.pictures(0, 2), served.tiny.PLACEHOLDER
    video = place.replace("<image>", tiny_grids.SPELLED["video"])
    prompt = f"5 {place} 4 {video} 7 {place} 8 9"
    inputs = served.processor(text=[prompt], images=pictures, videos=[film], return_tensors="pt")
    assert int(inputs["video_grid_thw"].prod()) // 4 <= 8
    given = {"image": pictures, "video": [film]}
    asked = {"prompt": prompt, "multi_modal_data": given} | asking.budget(8)
    asking.forget(served.engine)
    (output,) = asking.ask(served.engine, [asked])
    assert_same(output, served.answer(inputs, METHODS["attention"](8)))


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_two_ranks_answer_as_one(served):
    """Each has half of the tower's heads; both must keep the same rows."""
    keep = 0.3
    run = subprocess.run(
        [sys.executable, ranks_grids.__file__, served.name, served.folder, str(keep)],
        env=os.environ | asking.ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = ranks_grids.answers(served.engine, served.tiny, keep)
    assert json.loads(run.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video_pruning_rate": 0.5}, "expected no video_pruning_rate"),
        ({"mm_encoder_tp_mode": "data"}, "no rank sees all images"),
    ],
)
def test_what_cannot_be_right_is_refused_at_start(served, settings, message):
    with pytest.raises(NotImplementedError, match=message):
        asking.llm(served.folder, load_format="dummy", **asking.budget(0.3), **settings)
