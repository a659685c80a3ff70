"""A mask that comes with a later call says of every row in the cache whether it counts.

As the rows with which generate() fills up a batch's shorter answers: the next call leaves them out.
"""

import copy

import pytest
import torch
from masked_reference import MaskedReference
from test_generation import DETAILS, GREEDY, assert_same, leave_out_endings, next_turn
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava
from transformers import DynamicCache, StaticCache

import vtp_kernels as vtp

SETTINGS = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}
STAGES = {1: 0.5, 3: 0.25}
PYRAMID = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))
#: (method, stages of the reference): rows leave late, from layer 0 on, or not at all.
METHODS = {
    "late": (PYRAMID, STAGES),
    "layer 0": (vtp.RandomPruning(0, 0.3), {0: 0.3}),
    "keep all": (vtp.FastV(2, 1.0), {2: 1.0}),
}
BATCHES = {"one": one, "padded": three}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_llava(kind) for kind in ("sdpa", "eager")}


def talk(model, make, turns, pixels=None, **settings):
    """Two turns, rows of the first being masked in the second."""
    inputs = make()
    first = model.generate(**inputs, **SETTINGS)
    more = next_turn(first.sequences, inputs["attention_mask"], turns)
    leave_out_endings(more["attention_mask"], inputs["input_ids"].shape[1])
    more["attention_mask"][0, inputs["input_ids"].shape[1] - 3] = 0  # and a word of a question
    if pixels is not None:
        more["pixel_values"] = pixels
    return model.generate(**more, past_key_values=first.past_key_values, **SETTINGS, **settings)


def talk_both(models, attention, name, make, turns, pixels=None, positions="original"):
    method, stages = METHODS[name]
    with vtp.prune(models[attention], method, positions=positions) as run:
        pruned = talk(models[attention], make, turns, pixels)
        kept = run.report().kept
    given = kept if name == "layer 0" else None
    contiguous = positions == "contiguous"
    with MaskedReference(models["eager"], stages, given=given, contiguous=contiguous) as masked:
        expected = talk(models["eager"], make, turns, pixels)
    return pruned, expected, kept, masked.kept


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("rows", ["one row", "some rows"])
@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_further_turn_of_text(models, attention, name, inputs, rows, positions):
    """With one row, which has no mask of its own but where something is left out, and with some;
    and in the steps after them."""
    make = BATCHES[inputs]
    lengths = (0, 0, 0, 0) if rows == "one row" else (2, 5, 0, 7)
    turns = [prompt(0, n, seed=n) for n in lengths[: len(make()["input_ids"])]]
    if rows == "one row":
        turns = [tokens[:1] for tokens in turns]
    pruned, expected, _, _ = talk_both(models, attention, name, make, turns, positions=positions)
    assert_same(pruned, expected)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("first_images", [0, 1])
def test_a_further_turn_with_a_picture(models, attention, first_images, positions):
    def make():
        return batch(*(prompt(first_images, n, seed=n) for n in (3, 8, 5)))

    turns = [prompt(1, 2, seed=7), prompt(2, 6, seed=8), prompt(0, 4, seed=9)]
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    pruned, expected, kept, masked = talk_both(
        models, attention, "late", make, turns, pixels, positions
    )
    for layer in masked:
        assert torch.equal(kept[layer], masked[layer])
    assert_same(pruned, expected)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", METHODS)
def test_in_loops_by_hand(models, name, positions):
    """Step by step, rows of the prompt being left out meanwhile: pictures' rows, whether or not
    they are still there, and words; and counted in again."""
    inputs = three()
    method, stages = METHODS[name]
    width = inputs["input_ids"].shape[1]
    steps = torch.randint(3, 98, (4, 6), generator=torch.Generator().manual_seed(5))

    def loop(model):
        cache, logits = DynamicCache(config=model.config.text_config), []
        mask = inputs["attention_mask"].clone()
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        with torch.no_grad():
            for step in range(steps.shape[1] + 1):
                now = mask.clone()
                if step in (2, 3):
                    now[:, width - 9 : width - 2] = 0
                if step == 3:
                    now[1, -2] = 0
                if step == 4:
                    now[2, width - 30 : width - 20] = 0
                positions = (now.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = model(
                    input_ids=ids,
                    attention_mask=now,
                    position_ids=positions,
                    past_key_values=cache,
                    pixel_values=pixels,
                    logits_to_keep=1,
                )
                logits.append(output.logits)
                if step < steps.shape[1]:
                    ids, pixels = steps[:, step : step + 1], None
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        return logits

    with vtp.prune(models["sdpa"], method, positions=positions) as run:
        pruned = loop(models["sdpa"])
        kept = run.report().kept
    given = kept if name == "layer 0" else None
    contiguous = positions == "contiguous"
    with MaskedReference(models["eager"], stages, given=given, contiguous=contiguous):
        expected = loop(models["eager"])
    for a, b in zip(pruned, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_other_types(models, dtype):
    """Whatever is not zero counts, as a byte of a bool tensor too."""
    inputs = three()
    with vtp.prune(models["sdpa"], PYRAMID), torch.no_grad():
        cache = models["sdpa"](**inputs).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        mask[:, -6:-3] = 0
        other = (mask * 255).to(torch.uint8).view(dtype) if dtype == torch.bool else mask.to(dtype)
        call = {"input_ids": torch.full((4, 1), 5), "position_ids": mask.sum(1, keepdim=True) - 1}
        expected, got = (
            models["sdpa"](**call, attention_mask=m, past_key_values=copy.deepcopy(cache)).logits
            for m in (mask, other)
        )
    assert torch.equal(got, expected)


def test_a_static_cache(models):
    """generate() hands its masks over in four dimensions."""
    inputs, ids = three(), torch.full((4, 1), 5)
    for attention, model in models.items():
        outputs = []
        with vtp.prune(model, PYRAMID), torch.no_grad():
            for cache in (
                StaticCache(config=model.config, max_cache_len=96),
                DynamicCache(config=model.config),
            ):
                first = model.generate(**inputs, **SETTINGS, past_key_values=cache)
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
                mask[1, -5:-2] = 0
                mask[2, -7:-4] = 0
                call = {"input_ids": ids, "position_ids": mask.sum(1, keepdim=True) - 1}
                outputs.append(
                    model(**call, attention_mask=mask, past_key_values=first.past_key_values)
                )
        torch.testing.assert_close(*(x.logits for x in outputs), rtol=0, atol=2e-5, msg=attention)


# --- what cannot be ------------------------------------------------------------------------------


def test_padding_that_left_cannot_be_counted_in(models):
    inputs = three()
    with vtp.prune(models["sdpa"], PYRAMID), torch.no_grad():
        cache = models["sdpa"](**inputs).past_key_values
        step = {"input_ids": torch.full((4, 1), 5), "past_key_values": cache}
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        with pytest.raises(ValueError, match="attention_mask: it counts in rows that were padding"):
            models["sdpa"](**step, attention_mask=torch.ones_like(mask))
        with pytest.raises(ValueError, match=r"needs the mask \[B, S\] over all rows; got None"):
            models["sdpa"](**step)
        with pytest.raises(ValueError, match=r"expected \[B, \d+\], a column for each of"):
            models["sdpa"](**step, attention_mask=mask[:, -1:])
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]  # nothing was half done
        models["sdpa"](**step, attention_mask=mask)
        square = torch.ones(4, 1, 2, mask.shape[1] + 2).bool()
        with pytest.raises(NotImplementedError, match="4D mask"):
            step["input_ids"] = torch.full((4, 2), 5)
            models["sdpa"](**step, attention_mask=square)
