"""The analytic count against torch's own, and against a published number."""

import pytest
import torch
from tiny_llava import IMAGE, batch, one, prompt, tiny_llava
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import vtp_kernels as vtp
from vtp_kernels import _native
from vtp_kernels.accounting import Course, account
from vtp_kernels.methods import method_from_spec


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def model():
    return tiny_llava("eager")


def test_llava_1_5_7b():
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(), text_config=text)
    assert vtp.flops(config, 576 + 64) / 2e12 == pytest.approx(4.252, abs=5e-4)
    assert vtp.flops(text, 576 + 64) == vtp.flops(config, [640] * 32)
    # FastV's own setting, K = 2 and half of the tokens: about 45 % less (arXiv 2403.06764)
    less = 1 - vtp.flops(config, [640] * 2 + [352] * 30) / vtp.flops(config, 640)
    assert less == pytest.approx(0.43, abs=0.01)


def test_dense(model):
    inputs = one()
    torch_count = counted(lambda: model(**inputs, logits_to_keep=1))
    tokens = inputs["input_ids"].shape[1]
    assert vtp.flops(model, tokens, images=1, logits=1) == pytest.approx(torch_count, rel=0.01)
    assert vtp.flops(model.config, tokens) == vtp.flops(model, tokens)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_vision(model, strategy):
    model.config.vision_feature_select_strategy = strategy
    pixels = one()["pixel_values"].expand(3, -1, -1, -1)
    try:
        torch_count = counted(
            lambda: model.get_image_features(
                pixels, vision_feature_layer=-2, vision_feature_select_strategy=strategy
            )
        )
        ours = vtp.flops(model, 1, images=3) - vtp.flops(model, 1)
    finally:
        model.config.vision_feature_select_strategy = "default"
    assert ours == pytest.approx(torch_count, rel=0.01)


@pytest.mark.parametrize("method", [vtp.RandomPruning(0, 0.25), vtp.Schedule({1: 0.5, 4: 0})])
def test_pruned(model, method):
    inputs = one()
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    embedded = {key: value for key, value in inputs.items() if key != "pixel_values"}
    embedded["mm_encoder_outputs"] = {"image": features}
    with vtp.prune(model, method) as run:
        torch_count = counted(lambda: model(**embedded))
    report = run.report()
    rows = report.tokens_per_layer[-1][0]
    logits = vtp.flops(model, 1, logits=rows) - vtp.flops(model, 1)
    assert report.prefill_flops + logits == pytest.approx(torch_count, rel=0.01)
    assert report.dense_prefill_flops > 1.1 * report.prefill_flops


def test_keys_beyond_the_rows(model):
    text = model.config.text_config
    more = vtp.flops(text, 5, keys=[25] * 6) - vtp.flops(text, 5)
    assert more == 6 * 2 * 2 * 5 * 20 * 64


def test_errors(model):
    with pytest.raises(ValueError, match="tokens: got 3 numbers for 6 decoder layers"):
        vtp.flops(model, [1, 2, 3])
    with pytest.raises(ValueError, match="keys: got 1 numbers"):
        vtp.flops(model, 4, keys=[4])
    with pytest.raises(NotImplementedError, match="a 'llama' configuration has no vision"):
        vtp.flops(model.config.text_config, 4, images=1)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shallow_attention": "skip"},
        {"shallow_visual_rows": "none"},
        {"shallow_first_layer": "keep_second_half"},
        {"stages": ("shallow",)},
        {"stages": ("middle",)},
    ],
    ids=str,
)
def test_work_in_passive_layers_is_skipped(options):
    """What torch counts is what the report says, and less than a dense layer's work."""
    model = tiny_llava("eager", num_hidden_layers=14)  # torch does not count SDPA on a CPU
    method = vtp.VisiPruner(shallow_layers=6, fusion_threshold=0.99, token_threshold=0.3, **options)
    inputs = batch(prompt(3, 40, seed=0))
    name = "LlavaForConditionalGeneration.model.language_model"
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        model(**inputs)
    with vtp.prune(model, method) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    counts, dense_counts = counter.get_flop_counts(), dense.get_flop_counts()
    report = run.report()
    assert report.prefill_flops == pytest.approx(sum(counts[name].values()), rel=0.01)
    assert report.dense_prefill_flops == pytest.approx(sum(dense_counts[name].values()), rel=0.01)
    first = f"{name}.layers.1.self_attn"
    share = sum(counts[first].values()) / sum(dense_counts[first].values())
    if "shallow" not in method.stages:
        assert share == 1
    elif method.shallow_attention == "skip":
        assert share < 0.55  # 53 of 101 rows are text
    else:
        assert share < 0.98  # what remains is projections, and products among text


@pytest.mark.parametrize("options", ["skip", "exact", "exact,shallow_visual_rows=none"])
def test_pairs_are_those_of_the_report(options):
    """The account of a configuration is what a small model reports of a prompt."""
    model = tiny_llava(num_hidden_layers=6)
    spec = f"visipruner:stages=shallow,shallow_layers=3,shallow_attention={options}"
    inputs = batch(prompt(1, 5, seed=0))
    visual = inputs["input_ids"][0] == IMAGE
    first = int(visual.nonzero()[0])
    sizes = {"text": int((~visual).sum()), "before": first, "visual": int(visual.sum())}
    with vtp.prune(model, method_from_spec(spec)) as run, torch.no_grad():
        model(**inputs)
    config = model.config.text_config
    dense, pruned = (
        account(config, method, **sizes, course=Course(fusion_layer=5))
        for method in (None, method_from_spec(spec))
    )
    ours = 1 - pruned.visual_pairs / dense.visual_pairs
    assert ours == pytest.approx(run.report().visual_attention_reduction)
