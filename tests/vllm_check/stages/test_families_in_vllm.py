"""Pruning between the layers of small models of every family in vLLM, against transformers."""

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import json
import os
import subprocess
import sys

import asking
import ranks_grids
import staged
import tiny_grids
from in_both import METHODS, Grids, Tiles, assert_same
from vllm import SamplingParams

import vtp_kernels as vtp

TILES = ("tiny_internvl", "tiny_internvl_chat", "tiny_onevision")
STEPS = "schedule:1=0.5,2=0.2:text"


@pytest.fixture(scope="module", params=[*tiny_grids.FAMILIES, *TILES])
def served(request, tmp_path_factory):
    kind = Tiles if request.param in TILES else Grids
    folder = tmp_path_factory.mktemp(request.param)
    return kind(request.param, folder, **staged.method_settings(STEPS))


def in_transformers(served, pictures, method):
    original = {"positions": "original"} if isinstance(served, Tiles) else {}
    return served.in_transformers(pictures, method, **original)


def test_answers_are_those_of_transformers(served):
    """Wide and tall pictures, one, two and none, all in one batch, and from an empty cache each."""
    method = vtp.method(STEPS)
    some = [served.pictures(n, n + 1) for n in range(4)] + [served.pictures(0, 2)]
    asking.forget(served.engine)
    requests = [served.request(pictures) for pictures in some]
    text, *outputs = asking.ask(served.engine, [{"prompt": "5 6 7 8"}, *requests])
    for output, pictures in zip(outputs, some, strict=True):
        assert_same(output, in_transformers(served, pictures, method))
    (alone,) = asking.ask(served.engine, [{"prompt": "5 6 7 8"}])
    assert asking.tokens(alone) == asking.tokens(text)
    staged.assert_all_free(served.engine)


@pytest.mark.parametrize("served", list(tiny_grids.FAMILIES), indirect=True)
def test_a_budget_before_the_layers_goes_with_it(served):
    """As the two methods one after the other. (Positions close up before the layers of others, and
    not between: transformers has one of these at a time.)"""
    chain = vtp.Chain(METHODS["attention"](12), vtp.Schedule({1: 6, 2: 3}, score="text"))
    engine = staged.llm(chain.parts[1].to_dict(), served.folder)
    pictures = served.pictures(0, 1)
    (output,) = asking.ask(engine, [served.request(pictures, **asking.budget(12))])
    assert_same(output, served.in_transformers(pictures, chain))
    staged.assert_all_free(engine)


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(
    "method",
    [
        vtp.PyramidDrop((1, 2), (0.5, 0.2)),
        vtp.RandomPruning(0, 0.3),
        vtp.Schedule({2: 3}, score="contribution"),
        vtp.VisiPruner(
            shallow_layers=1, decision="fixed", schedule=vtp.Schedule({2: 3}, score="contribution")
        ),
        vtp.VisiPruner(("middle", "deep"), shallow_layers=0, min_keep=3, fusion_threshold=0.99),
        vtp.InflectionPruning(None, llm_layers=(1, 2), visual_keep="knee", text_keep=0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_of_every_kind(served, method):
    engine = staged.llm(method.to_dict(), served.folder)
    some = [served.pictures(n, n + 1) for n in range(3)] + [served.pictures(0, 2)]
    outputs = asking.ask(engine, [served.request(pictures) for pictures in some])
    for output, pictures in zip(outputs, some, strict=True):
        assert_same(output, in_transformers(served, pictures, method))
    staged.assert_all_free(engine)


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_requests_that_are_preempted_come_back_as_they_were(served):
    """In a cache that cannot hold all of them, with answers that outgrow it."""
    sampling = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True, logprobs=1)
    requests = [served.request(served.pictures(n % 4, n % 4 + 1)) for n in range(4)]
    asking.forget(served.engine)
    expected = served.engine.generate(requests, sampling, use_tqdm=False)
    settings = {"num_gpu_blocks_override": 30, "max_model_len": 256}
    small = staged.llm(STEPS, served.folder, **settings)
    seen = staged.watch(small)
    found = small.generate(requests, sampling, use_tqdm=False)
    assert seen.preempted
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, (asking.tokens(theirs), asking.logprobs(theirs)))
    staged.assert_all_free(small)


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_two_ranks_choose_as_one(served):
    """Before the layers, and between them."""
    keep = 0.9
    run = subprocess.run(
        [sys.executable, ranks_grids.__file__, served.name, served.folder, str(keep), STEPS],
        env=os.environ | asking.ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = ranks_grids.answers(served.engine, served.tiny, keep)
    assert json.loads(run.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("served", ["qwen2_vl"], indirect=True)
def test_videos_lose_tokens_as_pictures_do(served):
    """Beside a picture, and alone."""
    film = np.random.default_rng(0).integers(0, 256, (4, 84, 56, 3), dtype=np.uint8)
    pictures, place = served.pictures(0, 1), served.tiny.PLACEHOLDER
    video = place.replace("<image>", tiny_grids.SPELLED["video"])
    for prompt, shown in ((f"5 {place} 4 {video} 7 8 9", pictures), (f"6 {video} 8", [])):
        given = {"video": [film]} | ({"image": shown} if shown else {})
        (output,) = asking.ask(served.engine, [{"prompt": prompt, "multi_modal_data": given}])
        inputs = served.processor(
            text=[prompt], images=shown or None, videos=[film], return_tensors="pt"
        )
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        assert_same(output, served.answer(inputs, vtp.method(STEPS)))
    staged.assert_all_free(served.engine)
