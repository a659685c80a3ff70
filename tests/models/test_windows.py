"""Layers that see a sliding window: what a row saw before others left, it sees after, and no more.

Windows are shorter than the prompts, or shorter than prompt and answer together. What holds for all
families, these among them, is in test_every_family.py.
"""

import copy
import sys
from dataclasses import dataclass, field

import pytest
import torch
from masked_reference import MaskedReference
from test_generation import DETAILS, GREEDY, assert_same, leave_out_endings, next_turn
from tiny_llava import IMAGE, one, prompt, three, tiny_llava
from tiny_models import FAMILIES
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vtp_kernels as vtp
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.rows import PromptRows
from vtp_kernels.models.attention.stand_ins import ScoringAttention

SETTINGS = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}
STAGES = {1: 0.5, 3: 0.25, 5: 0.0}
PYRAMID = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))
#: LLaVA's text models: all layers have a window; or the last four, one that ends within the answer.
TEXTS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 35, "max_window_layers": 2},
}


def llava(text, attention="sdpa", **settings):
    return tiny_llava(attention, text=text, **TEXTS[text] | settings)


@pytest.fixture(scope="module", params=TEXTS)
def models(request):
    return {kind: llava(request.param, kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def gemma():
    return {kind: FAMILIES["gemma3"].model(kind) for kind in ("sdpa", "eager")}


def both(models, method, run, **settings):
    """What `run` puts out for the pruned model, and for one in which the same rows are masked; the
    scores of `method` are the reference's own but for random ones."""
    with vtp.prune(models["sdpa"], method, **settings) as handle:
        pruned = run(models["sdpa"])
        kept = handle.report().kept
    chooses = isinstance(method, vtp.PyramidDrop | vtp.Schedule)
    score = getattr(method, "score", "last_token")
    contiguous = settings.get("positions") == "contiguous"
    with MaskedReference(
        models["eager"],
        STAGES,
        score=score,
        given=None if chooses else kept,
        contiguous=contiguous,
    ) as masked:
        masked.stages = masked.stages if chooses else dict.fromkeys(kept)
        reference = run(models["eager"])
    for layer in kept:
        assert torch.equal(kept[layer], masked.kept[layer]), f"layer {layer}"
    return pruned, reference


@pytest.mark.parametrize(
    "make, method",
    [(one, PYRAMID), (three, PYRAMID), (three, vtp.RandomPruning(0, 0.3))],
    ids=["one", "padded", "before layer 0"],
)
def test_llava(models, make, method):
    def run(model):
        return model.generate(**make(), **SETTINGS | {"max_new_tokens": 12})

    assert_same(*both(models, method, run))
    with vtp.prune(models["sdpa"], vtp.Schedule({2: 1.0, 4: 1.0})):
        kept_all = run(models["sdpa"])
    assert_same(kept_all, run(models["sdpa"]), tolerance=0)


@pytest.mark.parametrize("score", ["text", "contribution"])
def test_scores_of_a_layer_with_a_window(models, score):
    method = vtp.Schedule({3: 0.5, 5: 3}, score=score)
    with vtp.prune(models["sdpa"], method) as run:
        models["sdpa"].generate(**three(), **SETTINGS)
        kept = run.report().kept
    with MaskedReference(models["eager"], {3: 0.5, 5: 3}, score=score) as masked:
        models["eager"].generate(**three(), **SETTINGS)
    for layer in kept:
        assert torch.equal(kept[layer], masked.kept[layer]), f"layer {layer}"


@dataclass(frozen=True)
class Looking(Method):
    """Keeps everything, and what each row paid to the visual tokens in every layer but the last."""

    seen: dict = field(default_factory=dict)

    def decision_layers(self, depth):
        return tuple(range(1, depth))

    def observed_layers(self, depth):
        return tuple(range(depth - 1))

    def decide(self, layer, rows):
        every = slice(0, rows.visual.shape[1])
        for name, payers in (("visual", rows.visual), ("text", rows.text)):
            for support in ("all", "candidates"):
                scores = rows.attention_scores(every, payers, support=support)
                self.seen[layer - 1, name, support] = scores


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "cohere2_vision"])
def test_what_any_row_pays(name, monkeypatch):
    """Those too that see others behind them, and those whose windows differ, some rows at once."""
    monkeypatch.setattr(sys.modules[PromptRows.__module__], "LOGITS", 4 * 4 * 50)
    family = FAMILIES[name]
    model = family.model("eager")
    inputs = family.batch(model, ((0,), 9), ((1,), 3), ((), 5))
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    method = Looking()
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        with vtp.prune(model, method):
            model(**inputs)
    for (layer, name, support), scores in method.seen.items():
        payers = visual if name == "visual" else real & ~visual
        weights = attentions[layer]
        if support == "candidates":
            weights = weights * visual[:, None, None]
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        paid = (weights.mean(1) * payers[:, :, None]).sum(1)
        paid = paid / payers.sum(1, keepdim=True).clamp(min=1) * visual
        torch.testing.assert_close(scores, paid, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "positions, early, score",
    [
        ("original", True, "last_token"),
        ("contiguous", False, "last_token"),
        ("original", False, "text"),
    ],
)
def test_a_second_turn(models, positions, early, score):
    """With more pictures. Where answers ended early, it leaves out what filled them up."""
    pictures = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    turns = [prompt(1, 2, seed=7), prompt(2, 6, seed=8), prompt(0, 4, seed=9), prompt(0, 1, seed=2)]

    def talk(model):
        inputs = three()
        first = model.generate(**inputs, **SETTINGS)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        if early:
            leave_out_endings(more["attention_mask"], inputs["input_ids"].shape[1])
        cache = first.past_key_values
        return model.generate(**more, pixel_values=pictures, past_key_values=cache, **SETTINGS)

    method = PYRAMID if score == "last_token" else vtp.Schedule(STAGES, score=score)
    assert_same(*both(models, method, talk, positions=positions))


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_gemma_talks_about_a_second_picture(gemma, positions):
    family = FAMILIES["gemma3"]
    inputs = family.batch(gemma["sdpa"], ((0,), 9), ((1, 2), 3), ((), 5))
    (_, (picture,)), (_, (other,)) = family.draw(gemma["sdpa"], ((0,), 0), ((0,), 0), seed=5)
    placeholders = family.placeholders(gemma["sdpa"], picture)
    words = torch.tensor([5, 6, 7])
    turns = [torch.cat((placeholders, words)), torch.cat((words, placeholders, words[:1])), words]

    def talk(model):
        first = model.generate(**inputs, **SETTINGS)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        more["token_type_ids"] = (more["input_ids"] == IMAGE).int()
        more["pixel_values"] = torch.cat((picture["pixel_values"], other["pixel_values"]))
        return model.generate(**more, past_key_values=first.past_key_values, **SETTINGS)

    assert_same(*both(gemma, PYRAMID, talk, positions=positions))


def test_a_cache_that_keeps_all_rows(models):
    """As one made without a config: windows are then the masks' alone; the last layer runs on few
    rows."""

    def run(model):
        return model.generate(**three(), **SETTINGS, past_key_values=DynamicCache())

    assert_same(*both(models, PYRAMID, run))


def test_a_static_cache_that_no_window_cuts():
    model = llava("qwen2", sliding_window=70)
    with vtp.prune(model, PYRAMID):
        expected = model.generate(**one(), **SETTINGS)
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert_same(model.generate(**one(), **SETTINGS, past_key_values=cache), expected)


def test_crop(models):
    """As after rejected drafts: what comes next is as if they had never been."""
    model, step = models["sdpa"], {"input_ids": torch.tensor([[5, 6, 7]])}
    with vtp.prune(model, PYRAMID), torch.no_grad():
        cache = model(**one()).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            model(input_ids=torch.full((1, 40), 8), past_key_values=(long := copy.deepcopy(cache)))
            long.crop(-40)
        cache.activate_past_recording()
        model(input_ids=torch.tensor([[8, 9, 10, 11]]), past_key_values=cache)
        cache.crop(-4)
        assert torch.equal(model(**step, past_key_values=cache).logits, expected)


# --- what report() says --------------------------------------------------------------------------


def test_report(models, gemma):
    """Pairs and keys, counted from the eager model's attention and from the cache."""
    family = FAMILIES["gemma3"]
    cases = (
        (models, three()),
        (gemma, family.batch(gemma["sdpa"], ((0,), 9), ((1, 2), 3), ((), 5))),
    )
    for pair, inputs in cases:
        method = vtp.RandomPruning(3, 0.4)
        with vtp.prune(pair["eager"], method) as run, torch.no_grad():
            cache = pair["eager"](**inputs).past_key_values
            report = run.report()
        visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
        with torch.no_grad():
            attentions = pair["eager"](**inputs, output_attentions=True).attentions
        seen = [(weights > 0).any(1) for weights in attentions]
        either = (visual[:, :, None] | visual[:, None]) & real[:, :, None] & real[:, None]
        stays = report.kept[3][:, :, None] & report.kept[3][:, None]
        dense = sum(int((x & either).sum()) for x in seen)
        pruned = sum(
            int((x & either & (stays | torch.tensor(i < 3))).sum()) for i, x in enumerate(seen)
        )
        assert report.visual_attention_reduction == pytest.approx(1 - pruned / dense)
        held = [layer.keys.shape[2] for layer in cache.layers]
        longest = report.kv_tokens_per_layer
        assert [max(x) for x in longest] == held
        assert any(a < max(b) for a, b in zip(held, report.tokens_per_layer, strict=True))


# --- what cannot be ------------------------------------------------------------------------------


def test_a_static_cache_that_a_window_cuts(models):
    with vtp.prune(models["sdpa"], PYRAMID):
        with pytest.raises(NotImplementedError, match=r"StaticSlidingWindowLayer.*window"):
            models["sdpa"].generate(**one(), **SETTINGS, cache_implementation="static")


def test_a_cache_with_other_windows(models):
    cache = DynamicCache(config=models["sdpa"].config)
    cache.layers = [DynamicSlidingWindowLayer(5) for _ in cache.layers]
    with vtp.prune(models["sdpa"], PYRAMID):
        with pytest.raises(NotImplementedError, match=r"past_key_values.*other windows"):
            models["sdpa"].generate(**one(), **SETTINGS, past_key_values=cache)
    assert not any(isinstance(layer.keys, torch.Tensor) for layer in cache.layers)


def test_attention_that_no_mask_can_tell():
    """FlashAttention cuts windows by the rows that are there: before anything runs."""
    AttentionInterface.register("my_own", sdpa_attention_forward)
    for kind in ("flash_attention_2", "my_own"):
        model = llava("mistral")
        model.model.language_model.config._attn_implementation = kind
        runs = model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("it ran"))
        with vtp.prune(model, PYRAMID), torch.no_grad():
            with pytest.raises(NotImplementedError, match=rf"{kind}.*window \(8\).*have 29 rows"):
                model(**one())
        runs.remove()


def test_layers_that_do_something_of_their_own():
    model = llava("qwen2")
    with pytest.raises(NotImplementedError, match=r"layer 2 sees a sliding window of 35.*are 0, 1"):
        vtp.apply(model, vtp.VisiPruner(shallow_layers=3))
    with pytest.raises(NotImplementedError, match=r"layer 3 sees .* InflectionPruning asks"):
        vtp.apply(model, vtp.InflectionPruning(None, llm_layers=(2, 4), text_keep=0.5))
    with pytest.raises(NotImplementedError, match=r"layer 2 sees .* ScoringAttention"):
        ScoringAttention(model.model.language_model.layers[2].self_attn)
    model = llava("qwen2")
    model.model.language_model.config.layer_types[1] = "chunked_attention"
    with pytest.raises(NotImplementedError, match="layers of chunked_attention"):
        vtp.apply(model, PYRAMID)


def test_what_paligemma_must_be_told():
    family = FAMILIES["paligemma"]
    model = family.model("sdpa")
    inputs = family.batch(model, ((0,), 9))
    types = inputs.pop("token_type_ids")
    with vtp.prune(model, PYRAMID), torch.no_grad():
        with pytest.raises(ValueError, match="token_type_ids: needed"):
            model(**inputs)
        with pytest.raises(NotImplementedError, match="token_type_ids: rows that see each other"):
            model(**inputs, token_type_ids=types.index_fill(1, torch.tensor([3]), 1))
