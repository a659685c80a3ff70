"""The trained weights: loadable as any LLaVA, small, and really able to see."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

import vtp_kernels as vtp
from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.demo import load
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate
from vtp_kernels.pocket_llava.model import TRAINED, processor

QUESTIONS = 100


@pytest.fixture(scope="module")
def pocket():
    return load(TRAINED, device="cpu")


def exact_match(pocket, method):
    return evaluate(*pocket, method, QUESTIONS, 50, "test", "test")["exact_match"]


def test_files_are_small_and_hold_no_pickle():
    files = [path for path in TRAINED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert not any(
        "/" in value for value in _strings(json.loads((TRAINED / "config.json").read_text()))
    )


def _strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_shape_of_the_model(pocket):
    model, _ = pocket
    config = model.config
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert config.image_seq_length == 256 and config.text_config.num_hidden_layers >= 8
    assert config.vision_config.model_type == "clip_vision_model"
    assert model.dtype == torch.float32  # float16 on disk, which a CPU computes slowly


def test_answers_held_out_questions_and_needs_the_picture(pocket):
    """The full figures, on 2,000 questions, are in benchmarks/results; here the tenth of it."""
    dense = exact_match(pocket, None)
    assert dense >= 0.9
    assert exact_match(pocket, vtp.RandomPruning(layer=0, keep=0.22)) <= dense - 0.1


def test_cls_points_at_the_objects(pocket):
    """Cosine to CLS at the feature layer: higher on patches that show an object."""
    model, tokens = pocket
    pictures = [scenes.scene("test", index) for index in range(32)]
    images = [Image.fromarray(picture.image) for picture in pictures]
    inputs = chat_inputs(tokens, images, ["how many shapes"] * len(images))
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    hidden = tower.hidden_states[model.config.vision_feature_layer]
    similarity = torch.cosine_similarity(hidden[:, :1], hidden[:, 1:], dim=-1)
    coverage = torch.stack([torch.from_numpy(p.coverage.max(0)).flatten() for p in pictures])
    on, off = similarity[coverage > 0.5], similarity[coverage == 0]
    assert on.median() > off.quantile(0.9)


def test_processor_on_disk_is_the_one_in_the_source(pocket):
    _, stored = pocket
    picture = Image.fromarray(scenes.scene("test", 0).image)
    texts = ["What color is the circle?", "where is the bar"]
    ours, theirs = (chat_inputs(p, [picture] * 2, texts) for p in (processor(), stored))
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours[name], theirs[name])
    assert (ours["input_ids"] == stored.image_token_id).sum(1).tolist() == [256, 256]


def test_case_and_punctuation_do_not_matter(pocket):
    model, tokens = pocket
    picture = scenes.scene("test", 0)
    shape = scenes.SHAPES[picture.things[0].shape]
    texts = [f"what color is the {shape}", f"What color is the {shape.upper()}?"]
    image = Image.fromarray(picture.image)
    first, second = greedy_answers(model, tokens, chat_inputs(tokens, [image] * 2, texts), 4)
    assert first == second == scenes.COLOR_NAMES[picture.things[0].color]
