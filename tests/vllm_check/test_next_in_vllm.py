"""A small LLaVA-NeXT with random weights in vLLM: the rows that stay, against a choice by hand."""

import math

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import asking
import tiny_next
import torch
from tiny_next import BEST, IMAGE, MOST, PATCHES, SIZES, drawing
from transformers import LlavaNextProcessor
from vllm import SamplingParams

from vtp_kernels import reference
from vtp_kernels.models.families import FAMILIES
from vtp_kernels.vllm.budget import Budget


@pytest.fixture(scope="module")
def model():
    return tiny_next.new_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tiny_next.save(model, tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def processor(folder):
    """As vLLM has it: which of the image processors of its kind it loads depends on what there is,
    and they do not scale alike."""
    return LlavaNextProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def next_engine(folder):
    return asking.llm(folder, max_model_len=400)


@torch.no_grad()
def rows_that_stay(model, processor, image, keep, score):
    """The rows of one image, [keep or all, C], by transformers and a choice with torch alone."""
    inputs = processor.image_processor(image, return_tensors="pt")
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    dense = model.get_image_features(pixels, sizes).pooler_output[0]
    views = pixels.shape[1]
    model.set_attn_implementation("eager")
    seen = model.model.vision_tower(
        pixels.flatten(0, 1), output_hidden_states=True, output_attentions=True
    )
    model.set_attn_implementation("sdpa")
    hidden = seen.hidden_states[-2]
    if score == "attention":
        scores = seen.attentions[-2][:, :, 0, 1:].mean(1)
    else:
        scores = torch.nn.functional.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1)
    tower = FAMILIES["llava_next"].tower(model.model)
    shows = tower.shows({"image_sizes": sizes}, views, PATCHES).tolist()
    assert len(shows) == len(dense)
    keep = Budget(keep, score).rows(len(dense))
    if score == "divprune":
        return dense[reference.select_diverse(dense[None], keep).indices[0]]
    ranked = [-scores.view(-1)[t].item() if t >= 0 else math.inf for t in shows]
    return dense[sorted(sorted(range(len(shows)), key=ranked.__getitem__)[:keep])]


def next_token(engine, images, **more):
    """What may come after `5 <image>... 7 8`: {token: logarithm of its probability}; and how many
    rows all images took."""
    request = {
        "prompt": "5 " + "<image> " * len(images) + "7 8",
        "multi_modal_data": {"image": images},
        **more,
    }
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=BEST)
    output = engine.generate([request], sampling, use_tqdm=False)[0]
    found = {token: seen.logprob for token, seen in output.outputs[0].logprobs[0].items()}
    return found, output.prompt_token_ids.count(IMAGE)


def rows_in_vllm(engine, processor, images, keep, score):
    """What the model in vLLM makes of a batch of images, padded to the one with most crops."""
    inputs = processor.image_processor(images, return_tensors="pt")
    budget = torch.tensor(Budget(keep, score).to_numbers(), dtype=torch.float64)
    with torch.inference_mode():
        return engine.apply_model(lambda served: served.embed_multimodal(**inputs, vtp=budget))[0]


def difference(found, other):
    return max(abs(found[token] - other[token]) for token in found.keys() & other.keys())


@pytest.mark.parametrize("score", ["attention", "similarity", "divprune"])
@pytest.mark.parametrize("keep", [10, 0.4, 84, MOST])
def test_rows_that_stay(next_engine, model, processor, keep, score):
    """Of images of several sizes, in one batch that pads them: as of each alone. 84 is more than
    112 x 112 has patches, so that some of its lines end; the others have fewer rows."""
    images = [drawing(size, seed) for seed, size in enumerate(SIZES)]
    found = rows_in_vllm(next_engine, processor, images, keep, score)
    for rows, image in zip(found, images, strict=True):
        expected = rows_that_stay(model, processor, image, keep, score)
        torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [13, MOST])
def test_prompts_have_these_rows(next_engine, processor, keep):
    """The next token is what it is after the same rows as embeddings."""
    images = [drawing(size, seed) for seed, size in enumerate(SIZES[:3])]
    rows = rows_in_vllm(next_engine, processor, images, keep, "attention")
    expected, count = next_token(next_engine, [image.clone() for image in rows])
    assert count == sum(map(len, rows))
    found, found_count = next_token(next_engine, images, **asking.budget(keep))
    assert found_count == count
    assert difference(found, expected) < 1e-3
    others = [image.flip(0).contiguous() for image in rows]
    assert difference(next_token(next_engine, others)[0], expected) > 1e-2


def test_a_budget_of_the_engine(folder, next_engine):
    small = asking.llm(folder, max_model_len=400, **asking.budget(20, "similarity"))
    for seed, size in enumerate(SIZES):
        image = drawing(size, seed)
        ours, count = next_token(small, [image])
        theirs, their_count = next_token(next_engine, [image], **asking.budget(20, "similarity"))
        assert count == their_count == 20
        assert difference(ours, theirs) < 1e-3


def test_more_than_any_image_has_is_refused(folder):
    with pytest.raises(RuntimeError, match=f"at most {MOST} tokens, got {MOST + 1}"):
        asking.llm(folder, max_model_len=400, **asking.budget(MOST + 1))
