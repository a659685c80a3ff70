"""A model, its processor and conversations, all so small that training takes a second."""

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vtp_kernels.methods.lvpruning import Conversation, Recipe
from vtp_kernels.pocket_llava import model as pocket
from vtp_kernels.pocket_llava import scenes

PATCH = 56  # 16 visual tokens
RECIPE = Recipe(
    layers=(1, 2),
    ratios=(0.5, 0.25),
    width=16,
    batch=4,
    micro_batch=2,
    learning_rate=1e-2,
    precision="fp32",
    save_every=2,
)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = pocket.config()
    config.vision_config.patch_size = PATCH
    config.vision_config.num_hidden_layers = 2
    config.vision_config.hidden_size = config.vision_config.intermediate_size = 32
    config.text_config.hidden_size = config.text_config.intermediate_size = 32
    config.text_config.num_hidden_layers = 4
    config.text_config.head_dim = 8
    config.image_seq_length = (scenes.IMAGE_SIZE // PATCH) ** 2
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def tiny_processor():
    processor = pocket.processor()
    processor.patch_size = PATCH
    return processor


def conversations(count, turns=1):
    """Questions of the pocket world; the pictures are of one colour each."""
    found = []
    for index in range(count):
        rng = scenes.generator("train", index)
        scene = scenes.scene("train", index)
        asked = [scenes.ask(scene, rng) for _ in range(turns)]
        image = Image.new("RGB", (scenes.IMAGE_SIZE,) * 2, tuple(rng.integers(0, 255, 3).tolist()))
        found.append(Conversation((image,), tuple((q.text, q.answer) for q in asked)))
    return found
