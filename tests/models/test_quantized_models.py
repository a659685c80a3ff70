"""Quantised weights: by bitsandbytes, by torch, and in modules that have no weight at all."""

import pytest
import torch
from by_hand import (
    KINDS,
    SETTINGS,
    answers,
    assert_same_answers,
    differ,
    gathered,
    plain_like,
    prompts,
    seen_through,
)
from masked_reference import MaskedReference
from pruning_methods import pruning_method
from tiny_llava import one, tiny_llava
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels.models.attention.ranks import all_heads
from vtp_kernels.models.modules.placement import out_features

bitsandbytes = pytest.importorskip("bitsandbytes")


def swapped(model, make):
    """The model with every linear module of its text model replaced by what `make` makes of it."""
    for parent in list(model.model.language_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return model


def four_bit(linear, storage=torch.uint8):
    """As bitsandbytes has it, packed two to a byte, or into numbers of `storage`."""
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.float32,
        quant_type="nf4",
        quant_storage=storage,
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", quant_storage=storage
    )
    return made.to("cpu")  # packs


class Packed(nn.Module):
    """As GPTQ and AWQ keep a matrix: integers of four bits, eight to a number, scales by row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data
        scales = weight.abs().amax(1, keepdim=True) / 7
        integers = (weight / scales).round().to(torch.int64) + 8
        shifts = 4 * torch.arange(8)
        packed = (integers.unflatten(1, (-1, 8)) << shifts).sum(-1)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("shifts", shifts)

    def forward(self, x):
        integers = (self.qweight[..., None] >> self.shifts & 15).flatten(1) - 8
        return x @ (integers * self.scales).T


MADE = {
    "bitsandbytes": four_bit,
    "bitsandbytes in bfloat16": lambda linear: four_bit(linear, torch.bfloat16),
    "packed": Packed,
}


@pytest.fixture(scope="module", params=MADE)
def quantized(request):
    model = swapped(tiny_llava("sdpa"), MADE[request.param])
    plain = plain_like(model, seen_through)
    return model, plain


@pytest.mark.parametrize("name", KINDS)
def test_four_bits_are_as_the_weights_they_stand_for(quantized, name, tmp_path):
    model, plain = quantized
    query = model.model.language_model.layers[0].self_attn.q_proj
    assert getattr(query, "weight", torch.empty(0)).shape != (64, 64)  # what is read elsewhere
    method = pruning_method(name, plain, tmp_path)
    expected = answers(plain, plain, method)
    assert_same_answers(answers(model, model, method), expected)
    whole = tiny_llava("sdpa")
    assert differ(answers(whole, whole, method), expected)


@pytest.mark.parametrize("name", KINDS)
def test_quantized_while_a_method_is_at_work(name, tmp_path):
    model, inputs = tiny_llava("sdpa"), prompts()
    method = pruning_method(name, model, tmp_path)
    with torch.no_grad(), vtp.prune(model, method):
        model(**inputs)
        swapped(model, four_bit)
        got = model(**inputs).logits
    plain = plain_like(model, seen_through)
    with torch.no_grad(), vtp.prune(plain, method):
        torch.testing.assert_close(got, plain(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_loaded_by_transformers(bits, tmp_path):
    """The usual way. A mask does the same: bitsandbytes rounds each row of eight bits by itself,
    but for a threshold by which one row would decide on the columns of all."""
    tiny_llava().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_threshold=0.0,
        bnb_4bit_compute_dtype=torch.float32,
        # Its CPU code wants rows of 64 numbers, which those of this vision tower are not.
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    query = model.model.language_model.layers[0].self_attn.q_proj
    assert type(query).__module__.startswith("bitsandbytes")
    inputs, stages = prompts(), {2: 0.5, 4: 0.25}
    with vtp.prune(model, vtp.PyramidDrop(tuple(stages), tuple(stages.values()))) as run:
        got = model.generate(**inputs, **SETTINGS)
        report = run.report()
    with MaskedReference(model, stages) as masked:
        expected = model.generate(**inputs, **SETTINGS)
    for layer, kept in report.kept.items():
        assert torch.equal(kept, masked.kept[layer])
    # Eight bits: the rest of the rows may round to another float16, and that to another integer.
    atol = 1e-4 if bits == 4 else 2e-2
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    held = sum(map(sum, report.kv_tokens_per_layer))
    assert report.kv_bytes == held * 2 * 2 * 16 * 4  # keys and values, heads, head_dim, float32


# ---- quantised as it runs ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", [vtp.FastV(2, 0.5), vtp.PyramidDrop((2, 4), (0.5, 0.25))])
def test_quantised_as_it_runs(method):
    whole = tiny_llava("sdpa")
    model = quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    query = model.model.language_model.layers[0].self_attn.q_proj
    assert callable(query.weight) and query.weight().dtype == torch.qint8
    inputs = one()
    with vtp.prune(model, method) as run, torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
        kept = run.report().kept
    torch.testing.assert_close(logits, gathered(model, inputs, kept)[0], rtol=0, atol=1e-4)
    assert not torch.allclose(logits, gathered(whole, inputs, kept)[0], atol=1e-2)
    assert not torch.allclose(logits, gathered(model, inputs, {})[0], atol=1e-2)
    # Scores are of the same row, rounded by a scale of its own: nearly the same tokens.
    with vtp.prune(whole, method) as run, torch.no_grad():
        whole(**inputs)
    for layer, others in run.report().kept.items():
        assert int((kept[layer] & others).sum()) >= 0.8 * int(others.sum())


# ---- how wide a projection is -----------------------------------------------------------------


class Named(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("linear", "features"),
    [
        (nn.Linear(6, 4), 4),
        (four_bit(nn.Linear(64, 32, bias=False)), 32),
        (four_bit(nn.Linear(64, 32, bias=False), torch.float32), 32),
        (Packed(nn.Linear(16, 4)), 4),
        (Named(outfeatures=12), 12),  # AutoGPTQ
        (Named(weight=nn.Parameter(torch.empty(3, 5)), in_features=5, out_features=6), 3),  # a rank
        (Named(weight=nn.Parameter(torch.empty(3, 5))), 3),
        (Named(weight=nn.Parameter(torch.empty(30)), in_features=5, out_features=6), 6),  # FSDP
    ],
)
def test_out_features(linear, features):
    assert out_features(linear) == features


def test_a_projection_of_unknown_width_is_refused():
    with pytest.raises(NotImplementedError, match="Named is not supported as a projection"):
        out_features(Named(qweight=1))
    model = tiny_llava()
    model.model.language_model.layers[0].self_attn.q_proj = Named(qweight=1)
    with pytest.raises(NotImplementedError, match="Named is not supported as a projection"):
        vtp.apply(model, vtp.FastV(2))


def test_packed_heads_of_another_number_are_refused():
    attention = tiny_llava().model.language_model.layers[0].self_attn
    attention.q_proj = four_bit(nn.Linear(64, 32, bias=False))  # two of four heads
    with pytest.raises(NotImplementedError, match="32 features for 4 heads of 16"):
        all_heads(attention)
