"""The families' own processors, for the small models of tiny_llava and tiny_models: words w3, w4
and so on, pictures as in the chat templates of each family."""

import torch
from tiny_llava import IMAGE
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

CLIP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
LLAVA = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", 96: "<img>", 97: "</img>", 98: "<video>"}


class Frames:
    """Makes of frames what transformers' video processors do, which need torchvision."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, videos, do_sample_frames, video_metadata=None, **kwargs):
        assert not do_sample_frames
        processed = [self.image_processor(frames, return_tensors="pt") for frames in videos]
        if "image_grid_thw" not in processed[0]:
            pixels = torch.stack([one["pixel_values"] for one in processed])
            return {"pixel_values_videos": pixels}
        patches = torch.cat([pairs_of_frames(one) for one in processed])
        sizes = [one["image_grid_thw"] for one in processed]
        sizes = [[len(size) // 2, *size[0, 1:].tolist()] for size in sizes]
        return {
            "pixel_values_videos": patches,
            "video_grid_thw": torch.tensor(sizes),
            "video_metadata": [VideoMetadata(**one) for one in video_metadata],
        }

    merge_size = temporal_patch_size = 2


def pairs_of_frames(frames):
    """[N, 96]: patches of Qwen's frames, two and two, from pictures of two equal frames each."""
    patches = frames["pixel_values"].view(len(frames["image_grid_thw"]), -1, 3, 2, 16)[:, :, :, 0]
    return torch.stack((patches[::2], patches[1::2]), 3).flatten(0, 1).flatten(1)


def with_any_video_processor(processor):
    """Processors check that theirs are transformers' own."""

    class AnyVideoProcessor(processor):
        def check_argument_for_proper_class(self, name, argument):
            if name != "video_processor":
                super().check_argument_for_proper_class(name, argument)

    return AnyVideoProcessor


def tokenizer(image_token):
    names = SPECIAL | {IMAGE: image_token}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(100)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<img>", "</img>", "<video>", image_token],
        extra_special_tokens={
            "image_token": image_token,
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": image_token,
        },
        padding_side="left",
    )


def template(picture):
    return (
        "<s> {% for message in messages %}{% if message['content'] is string %}"
        "{{ message['content'] }} {% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + picture
        + " {% elif part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )


def llava():
    return LlavaProcessor(
        CLIPImageProcessorPil(**CLIP),
        tokenizer("<image>"),
        **LLAVA,
        chat_template=template("<image>"),
    )


def llava_next():
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**CLIP, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]),
        tokenizer("<image>"),
        **LLAVA,
        chat_template=template("<image>"),
    )


def llava_onevision():
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    return with_any_video_processor(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(
            size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer("<image>"),
        Frames(CLIPImageProcessorPil(size={"height": 56, "width": 56}, crop_size=56)),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def internvl():
    return with_any_video_processor(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}, crop_to_patches=True),
        tokenizer("<context>"),
        Frames(CLIPImageProcessorPil(size={"height": 112, "width": 112}, crop_size=112)),
        image_seq_length=16,
        chat_template=template("<context>"),
    )


def qwen2_5_vl():
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    return with_any_video_processor(Qwen2_5_VLProcessor)(
        pictures,
        tokenizer("<image>"),
        Frames(pictures),
        chat_template=template("<img> <image> </img>"),
    )


PROCESSORS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_5_vl": qwen2_5_vl,
}
