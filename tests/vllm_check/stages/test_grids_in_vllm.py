"""Small models with M-RoPE in vLLM: the tokens of their images that stay, and where these stand."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import plain_grids
import torch
from plain_grids import pictures, request
from safetensors.torch import load_file, save_file
from tiny_grids import NAMES, new_model, new_processor
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


def test_without_a_budget_answers_are_those_of_vllm_alone(served):
    command = [sys.executable, plain_grids.__file__, served.folder]
    environment = os.environ | {"VLLM_PLUGINS": "none"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    asking.forget(served.engine)
    assert plain_grids.answers(served.engine) == json.loads(run.stdout.splitlines()[-1])


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
