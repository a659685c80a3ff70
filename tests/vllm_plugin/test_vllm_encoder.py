"""Embeddings for vLLM: the rows that InflectionPruning keeps before layer 0."""

import pytest

pytest.importorskip("transformers")

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

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
