"""The families' own processors, for the small models of tiny_llava and tiny_models: words w3, w4
and so on, pictures as in the chat templates of each family."""

import torch
from tiny_llava import IMAGE
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AyaVisionProcessor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MiniCPMV4_6Processor,
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
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

MINICPM = {
    "image_start_token": (96, "<image>"),
    "image_end_token": (97, "</image>"),
    "slice_start_token": (94, "<slice>"),
    "slice_end_token": (95, "</slice>"),
    "image_id_start_token": (92, "<image_id>"),
    "image_id_end_token": (91, "</image_id>"),
    "newline_token": (93, "\n"),
}
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


class SlicedFrames:
    """Makes of frames what MiniCPM's video processor does, which needs torchvision."""

    slice_mode, downsample_mode = True, "16x"

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, videos, do_sample_frames, **kwargs):
        assert not do_sample_frames
        made = self.image_processor([x for video in videos for x in video], return_tensors="pt")
        return {
            "pixel_values_videos": made["pixel_values"],
            "target_sizes_videos": made["target_sizes"],
            "grids_videos": torch.tensor(made["grids"]),
            "num_frames_per_video": [len(video) for video in videos],
        }


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


def tokenizer(image_token, **marks):
    """marks: words that mean something, each (id, word), by the names that processors have."""
    names = SPECIAL | {IMAGE: image_token} | dict(marks.values())
    vocabulary = {names.get(i, f"w{i}"): i for i in range(100)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[names[i] for i in names if i > 2],
        extra_special_tokens={
            "image_token": image_token,
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": image_token,
            **{name: word for name, (_, word) in marks.items()},
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


def aya_vision():
    """TILE_1 and so on, before its tiles, are words that it does not know."""
    return AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}),
        tokenizer("<|IMG_PATCH|>"),
        patch_size=28,
        img_size=112,
        chat_template=template("<image>"),
    )


def minicpmv4_6():
    pictures = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=64)
    return with_any_video_processor(MiniCPMV4_6Processor)(
        pictures,
        SlicedFrames(pictures),
        tokenizer("<i>", **MINICPM),
        chat_template=template("<i>"),
    )


PROCESSORS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_5_vl": qwen2_5_vl,
}
CUT = {"aya_vision": aya_vision, "minicpmv4_6": minicpmv4_6}  # with words between tiles
