"""Small models with M-RoPE in vLLM: the tokens of their images that stay, and where these stand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import plain_grids
import torch
from plain_grids import pictures, request
from safetensors.torch import load_file, save_file
from tiny_grids import NAMES, PICTURE, new_model, new_processor
from tiny_next import IMAGE
from transformers import AutoProcessor

import vtp_kernels as vtp

METHODS = {
    "attention": lambda keep: vtp.VisPruner(keep, important=1.0, per="picture"),
    "divprune": lambda keep: vtp.DivPrune(keep, per="picture"),
    "similarity": lambda keep: vtp.InflectionPruning(
        "similarity", llm_layers=(), min_keep=keep, max_keep=keep
    ),
}


class Served:
    """The same weights in vLLM and in transformers."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        self.model = new_model(family)
        self.model.save_pretrained(folder)
        as_released(folder / "model.safetensors")
        new_processor(family).save_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.engine = asking.llm(folder, **plain_grids.SETTINGS)

    def in_transformers(self, images, method, text="7 8 9"):
        """Tokens, and the logarithms of their probabilities."""
        prompt = request(images, text)["prompt"]
        inputs = self.processor(text=[prompt], images=images, return_tensors="pt")
        return self.answer(inputs, method)

    def answer(self, inputs, method):
        with vtp.prune(self.model, method):
            found = self.model.generate(
                **inputs,
                max_new_tokens=asking.LONGEST_ANSWER,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = found.sequences[0, -len(found.logits) :].tolist()
        steps = zip(new, found.logits, strict=True)
        return new, [x.log_softmax(-1)[0, token].item() for token, x in steps]


def as_released(path):
    """Released checkpoints, and vLLM, have the weights of experts the other way round."""
    weights = load_file(path)
    turned = {
        name: x.transpose(1, 2).contiguous() if ".experts." in name else x
        for name, x in weights.items()
    }
    save_file(turned, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=list(NAMES))
def served(request, tmp_path_factory):
    return Served(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(output, expected):
    tokens, steps = expected
    assert asking.tokens(output) == tokens
    difference = torch.tensor(asking.logprobs(output)) - torch.tensor(steps)
    assert difference.abs().max() < 1e-4


def in_another_process(served, settings, **variables):
    command = [sys.executable, plain_grids.__file__, served.folder, json.dumps(settings)]
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_without_a_budget_answers_are_those_of_vllm_alone(served):
    plain = in_another_process(served, {}, VLLM_PLUGINS="none")
    asking.forget(served.engine)
    assert plain_grids.answers(served.engine) == plain


@pytest.mark.parametrize("served", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_two_ranks_say_the_same(served):
    budget = asking.budget(0.4)
    found = in_another_process(served, {"tensor_parallel_size": 2} | budget)
    asking.forget(served.engine)
    expected = plain_grids.answers(served.engine, **budget)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], abs=1e-3)


@pytest.mark.parametrize(
    ("keep", "score"), [(5, "attention"), (0.4, "attention"), (0.4, "divprune"), (6, "similarity")]
)
def test_answers_are_those_of_transformers(served, keep, score):
    """Images of all shapes, several in a prompt, prompts read in pieces, and a second turn."""
    budget, method = asking.budget(keep, score), METHODS[score](keep)
    some = [pictures(n) for n in range(5)] + [pictures(0, 1, 2)]
    if score == "similarity":
        some = some[:5]  # it chooses in a prompt, not in a picture
    asking.forget(served.engine)
    outputs = asking.ask(served.engine, [request(x, **budget) for x in some])
    answers = [served.in_transformers(x, method) for x in some]
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)
    assert any(output.prompt_token_ids.count(IMAGE) == 5 for output in outputs) or keep != 5
    text = " ".join(["7 8 9", *map(str, answers[-1][0]), "9 10"])
    (again,) = asking.ask(served.engine, [request(some[-1], text, **budget)])
    assert_same(again, served.in_transformers(some[-1], method, text))


def test_budgets_meet_in_one_batch_and_share_no_cache_entry(served):
    budgets = [{}, asking.budget(5), asking.budget(5, "divprune"), asking.budget(0.9)]
    requests = [request(pictures(0, 1), **budget) for budget in budgets]
    alone = []
    for one in requests:
        asking.forget(served.engine)
        alone += asking.ask(served.engine, [one])
    asking.forget(served.engine)
    for _ in range(2):  # together, then from what is cached
        together = asking.ask(served.engine, requests)
        for output, expected in zip(together, alone, strict=True):
            assert_same(output, (asking.tokens(expected), asking.logprobs(expected)))
    assert len({tuple(asking.logprobs(output)) for output in alone}) == len(budgets)


@pytest.mark.parametrize("served", ["qwen2_vl"], indirect=True)
def test_a_video_beside_pruned_images_is_as_it_was(served):
    """It has fewer tokens than the budget leaves, and so keeps them all in transformers."""
    film = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    images = pictures(0, 1)
    prompt = f"5 {PICTURE} 4 <start> <video> <end> 7 {PICTURE} 8 9"
    inputs = served.processor(text=[prompt], images=images, videos=[film], return_tensors="pt")
    assert int(inputs["video_grid_thw"].prod()) // 4 <= 8
    given = {"image": images, "video": [film]}
    asked = {"prompt": prompt, "multi_modal_data": given} | asking.budget(8)
    asking.forget(served.engine)
    (output,) = asking.ask(served.engine, [asked])
    assert_same(output, served.answer(inputs, METHODS["attention"](8)))


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_what_cannot_be_together_is_refused(served):
    for settings, name in (
        ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
        ({"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode"),
    ):
        with pytest.raises(Exception, match=f"{name}: not together with a budget"):
            asking.llm(served.folder, load_format="dummy", **asking.budget(5), **settings)
