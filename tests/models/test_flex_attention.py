"""FlexAttention takes block masks. Run uncompiled, by torch's own rule of what it computes:
compiling it takes half a minute for each shape, and fails for left-padded batches on some CPUs."""

import pytest
import torch
from masked_reference import MaskedReference
from pruning_methods import pruning_method
from tiny_llava import batch, one, prompt, three, tiny_llava
from tiny_models import FAMILIES
from torch.nn.attention.flex_attention import BlockMask
from transformers import StaticCache

import vtp_kernels as vtp

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

GREEDY = {"max_new_tokens": 3, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
STAGES = {2: 0.5, 4: 0.25}
METHOD = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def flex():
    model = tiny_llava("sdpa")
    model.set_attn_implementation({"text_config": "flex_attention"})
    return model


@pytest.fixture(scope="module")
def eager():
    return tiny_llava("eager")


def assert_same(some, others):
    assert torch.equal(some.sequences, others.sequences)
    for a, b in zip(some.logits, others.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [one, three])
def test_flex_attention_is_as_with_a_mask(flex, eager, make, settings):
    masks = []
    hook = flex.model.language_model.layers[4].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with vtp.prune(flex, METHOD) as run:
        got = flex.generate(**make(), **GREEDY, **DETAILS, **settings)
    hook.remove()
    with MaskedReference(eager, STAGES) as masked:
        expected = eager.generate(**make(), **GREEDY, **DETAILS, **settings)
    assert all(torch.equal(run.report().kept[layer], masked.kept[layer]) for layer in STAGES)
    assert_same(got, expected)
    assert any(isinstance(mask, BlockMask) for mask in masks)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_second_turn(flex, eager, positions):
    """Of text, in which one conversation says more than the other."""
    inputs = batch(prompt(1, 9, 0), prompt(2, 3, 1))
    more = torch.tensor([[0, 0, 11, 12], [21, 22, 23, 24]])

    def turns(model):
        first = model.generate(**inputs, **GREEDY, **DETAILS)
        answered = first.sequences.shape[1] - inputs["attention_mask"].shape[1]
        said = torch.ones(2, answered).long()
        second = model.generate(
            input_ids=torch.cat((first.sequences, more), dim=1),
            attention_mask=torch.cat((inputs["attention_mask"], said, more.ne(0).long()), dim=1),
            past_key_values=first.past_key_values,
            **GREEDY,
            **DETAILS,
        )
        return first, second

    with vtp.prune(flex, METHOD, positions=positions):
        got = turns(flex)
    with MaskedReference(eager, STAGES, contiguous=positions == "contiguous"):
        expected = turns(eager)
    for some, others in zip(got, expected, strict=True):
        assert_same(some, others)


def test_windows_and_pictures_whose_rows_see_each_other():
    family = FAMILIES["gemma3"]
    flex, eager = family.model("sdpa"), family.model("eager")
    flex.set_attn_implementation({"text_config": "flex_attention"})
    inputs = family.batch(flex, ((0,), 9), ((), 5))
    with vtp.prune(flex, METHOD) as run:
        got = flex.generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(eager, STAGES) as masked:
        expected = eager.generate(**inputs, **GREEDY, **DETAILS)
    assert all(torch.equal(run.report().kept[layer], masked.kept[layer]) for layer in STAGES)
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["visipruner", "visipruner that skips", "inflection with padding"])
def test_other_methods_do_as_under_another_attention(flex, name, tmp_path):
    sdpa = tiny_llava("sdpa")
    method = pruning_method(name, sdpa, tmp_path)
    with vtp.prune(flex, method), vtp.prune(sdpa, method):
        assert_same(
            flex.generate(**three(), **GREEDY, **DETAILS),
            sdpa.generate(**three(), **GREEDY, **DETAILS),
        )


def test_a_static_cache_is_refused(flex):
    """Dense, too, its answers are wrong from the second token on (transformers 5.23)."""
    with vtp.prune(flex, METHOD), torch.no_grad():
        cache = StaticCache(config=flex.config, max_cache_len=128)
        with pytest.raises(NotImplementedError, match=r"StaticCache .*'flex_attention'.*'sdpa'"):
            flex(**one(), past_key_values=cache)
