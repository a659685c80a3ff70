"""End to end: the small trained LLaVA on the GPU keeps the tokens and gives the answers it does on
the CPU."""

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image

from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.demo import load, pocket_methods
from vtp_kernels.methods import FastV, InflectionPruning
from vtp_kernels.models import prune
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate
from vtp_kernels.pocket_llava.model import TRAINED

METHODS = {
    "dense": None,
    **pocket_methods(),
    "inflection": InflectionPruning("attention", llm_layers=(2, 4)),
    "inflection with padding": InflectionPruning(max_keep=96, llm_layers=(2, 4)),
}


@pytest.fixture(scope="module")
def questions():
    """One picture, one question of each kind, with the true answers."""
    drawn = scenes.scene("demo", 1)
    rng = scenes.generator("demo", 1_000_001)
    asked = [scenes.ask(drawn, rng, kind) for kind in scenes.KINDS]
    return Image.fromarray(drawn.image), asked


@pytest.fixture(scope="module")
def float32_models():
    """The same weights on both devices, without TF32, which the GPU would else convolve in."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    loaded = {name: load(TRAINED, device=name) for name in ("cpu", "cuda")}
    yield {name: (model.float(), processor) for name, (model, processor) in loaded.items()}
    torch.backends.cudnn.allow_tf32 = before


def outcome(model, processor, questions, method, **options):
    """Answers, and the tokens kept at each layer."""
    image, asked = questions
    texts = [question.text for question in asked]
    inputs = chat_inputs(processor, [image] * len(texts), texts).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if method is None:
        return greedy_answers(model, processor, inputs, 4), {}
    with prune(model, method, **options) as run:
        answers = greedy_answers(model, processor, inputs, 4)
    return answers, run.report().to_dict()["kept"]


@pytest.mark.parametrize("name", METHODS)
def test_as_on_the_cpu(float32_models, questions, name):
    method = METHODS[name]
    want = outcome(*float32_models["cpu"], questions, method)
    got = outcome(*float32_models["cuda"], questions, method)
    assert got == want
    if method is None:
        assert got[0] == [question.answer for question in questions[1]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_native_keeps_what_the_reference_keeps(float32_models, questions, name):
    got, want = (
        outcome(*float32_models["cuda"], questions, METHODS[name], backend=backend)
        for backend in ("native", "reference")
    )
    assert got == want


def test_inflection_with_max_keep_waits_for_nothing(float32_models, questions):
    class Watched(InflectionPruning):
        def decide(self, layer, rows):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().decide(layer, rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for source in ("similarity", "attention"):
        settings = {"max_keep": 64, "llm_layers": (2, 4)}
        want = outcome(*float32_models["cuda"], questions, InflectionPruning(source, **settings))
        got = outcome(*float32_models["cuda"], questions, Watched(source, **settings))
        assert got == want


@pytest.mark.parametrize("method", (None, FastV(layer=2, keep=0.5)), ids=("dense", "FastV"))
def test_answers_in_float16(method):
    """As it is loaded for a GPU: float16, TF32 as torch has it."""
    model, processor = load(TRAINED, device="cuda")
    assert model.dtype == torch.float16
    assert evaluate(model, processor, method, 200, 100, "test", "test")["exact_match"] >= 0.9
