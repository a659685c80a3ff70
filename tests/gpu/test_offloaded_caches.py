"""Keys that are on the CPU but while their layer runs: the small trained LLaVA gives the answers
and keeps the tokens that it does with keys that stay on the GPU."""

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image

from vtp_kernels.chat import chat_inputs
from vtp_kernels.demo import load, pocket_methods
from vtp_kernels.models import prune
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


@pytest.fixture(scope="module")
def asked():
    """The model, and a batch of questions about one picture."""
    model, processor = load(TRAINED, device="cuda")
    drawn = scenes.scene("demo", 1)
    rng = scenes.generator("demo", 1_000_001)
    texts = [scenes.ask(drawn, rng, kind).text for kind in scenes.KINDS]
    inputs = chat_inputs(processor, [Image.fromarray(drawn.image)] * len(texts), texts)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model, inputs


def outcome(model, inputs, method, cache):
    with prune(model, method) as run:
        output = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            cache_implementation=cache,
        )
        return output.sequences, run.report().kept, output.past_key_values


@pytest.mark.parametrize(
    ("offloaded", "staying"), [("offloaded", "dynamic"), ("offloaded_static", "static")]
)
@pytest.mark.parametrize("name", pocket_methods())
def test_as_with_keys_that_stay(asked, name, offloaded, staying):
    method = pocket_methods()[name]
    expected, kept, _ = outcome(*asked, method, staying)
    got, others, held = outcome(*asked, method, offloaded)
    assert {layer.keys.device.type for layer in held.layers} >= {"cpu"}
    assert torch.equal(got, expected)
    for layer, mask in kept.items():
        assert torch.equal(mask, others[layer])
