"""Embeddings for vLLM: the rows that InflectionPruning keeps before layer 0."""

import pytest

pytest.importorskip("transformers")

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PixtralVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

import vtp_kernels as vtp
from vtp_kernels import vllm as plugin
from vtp_kernels.chat import chat_inputs
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED, processor


def pictures(count):
    return [Image.fromarray(case.scene.image) for case in scenes.cases("test", count)]


@pytest.mark.parametrize("source", ["attention", "similarity"])
def test_rows_are_those_that_the_model_would_keep(source):
    method = vtp.InflectionPruning(source=source, rule="mass", llm_layers=())
    images = pictures(3)
    embeddings = plugin.encode(images, TRAINED, method)
    model = LlavaForConditionalGeneration.from_pretrained(TRAINED)
    inputs = chat_inputs(processor(), images, ["what color is the circle ?"] * 3)
    with vtp.prune(model, method) as run:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    kept = run.report().kept[0]
    visual = inputs["input_ids"] == model.config.image_token_id
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert len(embeddings) == 3 and len({len(rows) for rows in embeddings}) > 1
    for rows, feature, mask, here in zip(embeddings, features, kept, visual, strict=True):
        expected = torch.as_tensor(feature)[mask[here]]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
        assert not rows.requires_grad and rows.device.type == "cpu"


def test_llava_next_keeps_the_ends_of_its_lines():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**size, num_hidden_layers=3, image_size=56, patch_size=14),
        text_config=LlamaConfig(**size, vocab_size=100, num_hidden_layers=1),
        image_token_index=99,
        image_grid_pinpoints=[[112, 112]],
    )
    model = LlavaNextForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    method = vtp.InflectionPruning(source="attention", rule="mass", mass=0.5, llm_layers=())
    (rows,) = plugin.encode(pictures(1), plugin.Encoder(model, images), method)
    dense = model.get_image_features(**images(pictures(1), return_tensors="pt")).pooler_output[0]
    assert len(dense) == 16 + 4 * 16 + 8
    newline = model.model.image_newline
    assert int((rows == newline).all(1).sum()) == 8 < len(rows) < len(dense)
    places = iter(range(len(dense)))
    for row in rows:  # in their order
        assert any(torch.allclose(row, dense[place], atol=1e-5) for place in places)


def test_the_language_model_is_not_loaded():
    encoder = plugin.Encoder.load(TRAINED)
    assert len(encoder.base.language_model.layers) == 0
    assert plugin.encode([], encoder) == []


def test_what_cannot_be_done_in_vllm_is_refused_before_anything_is_loaded():
    images = pictures(1)
    for method, error, message in (
        (vtp.InflectionPruning(), ValueError, "method.llm_layers"),
        (vtp.InflectionPruning(source=None, llm_layers=()), ValueError, "method.source"),
        (vtp.InflectionPruning(min_keep=0, llm_layers=()), ValueError, "method.min_keep"),
        (vtp.FastV(2, 0.5), TypeError, "expected an InflectionPruning"),
    ):
        with pytest.raises(error, match=message):
            plugin.encode(images, "nowhere", method)


def test_pictures_with_line_breaks_between_their_rows_are_refused():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**size, num_hidden_layers=1, image_size=56),
        text_config=LlamaConfig(**size, vocab_size=100, num_hidden_layers=1),
    )
    with pytest.raises(NotImplementedError, match="and that sees pictures of one size"):
        plugin.Encoder(LlavaForConditionalGeneration(config), None)
