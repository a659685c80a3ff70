"""Models that read pictures and are not taken, and why: those of transformers without a page."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["NOT_LOOKED_AT", "REFUSED", "refused", "why_refused"]

NOT_LOOKED_AT = "not looked at yet"
NOT_TRIED = "not tried: no reason is known why it should not work"

_REASONS = {
    NOT_TRIED: (
        "cohere_compass",
        "cosmos3_omni",
        "deepseek_ocr2",
        "emu3",
        "fast_vlm",
        "perception_lm",
    ),
    "an encoder reads the picture, and text attends to it across: no rows of text are visual": (
        "blip",
        "florence2",
        "idefics",
        "mllama",
        "pix2struct",
        "pp_formulanet",
        "t5gemma2",
        "udop",
        "vision-encoder-decoder",
    ),
    "few visual tokens, 32 or 64 a picture, whatever it shows": (
        "blip-2",
        "instructblip",
        "instructblipvideo",
        "kosmos-2",
    ),
    "a sliding window over what is generated alone, in a cache of its own": ("unlimited_ocr",),
    "sliding-window layers, and layers without rotary positions": ("muse_glimmer", "muse_spark"),
    "sliding-window layers, and short convolutions of keys and values": (
        "inkling2",
        "inkling_mm_model",
    ),
    "sliding-window layers, and other numbers of heads in them": ("step3p7",),
    "rows go from layer to layer in four versions (AltUp), each layer gets an input of its own for "
    "every row, and the last ones attend to keys of earlier ones that no cache holds for them": (
        "gemma3n",
    ),
    "values are normalised, or are the keys, and heads have two sizes; in the small ones the last "
    "layers attend to keys of earlier ones that no cache holds for them, and each gets an input of "
    "its own for every row": ("gemma4", "gemma4_unified"),
    "rotary positions are complex numbers, with a norm behind them; layers without them scale "
    "queries by counting the rows they get, and the others attend within chunks": ("llama4",),
    "pictures of a prompt see each other, across the text between them": ("molmo2",),
    "Mamba: a state goes on from row to row, in layers of another kind": ("nemotron_h_omni",),
    "a gate for each head of its attention": ("lfm3_vl",),
    "keys and values are kept as one latent (MLA)": (
        "dots3_note",
        "kimi_k25",
        "mistral4",
        "mistral_large4",
    ),
    "layers choose which keys they see (sparse attention)": (
        "glm5_next",
        "minimax_m3_vl",
        "qwen4_exp",
    ),
    "queries and keys are normalised behind the rotary positions": ("hunyuan_vl",),
    "one projection for queries, keys and values": ("fuyu",),
    "positions are added to embeddings, not rotated": ("kosmos-2.5",),
    "its decoder is not a model of its own": ("chameleon",),
    "pictures come in front of the text, without placeholders in it": ("git",),
    "makes no text from left to right: blocks by diffusion": ("diffusion_gemma",),
    "makes actions of a robot, not text": ("pi0",),
    "reads proteins, not pictures": ("evolla",),
}

REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
"""{model_type: why}"""


def refused(taken: Collection[str]) -> dict[str, str]:
    """{model_type: why} of all models of the installed transformers that read pictures, but those
    of the classes `taken`."""
    return {
        kind: REFUSED.get(kind, NOT_LOOKED_AT)
        for kind, architecture in _architectures().items()
        if architecture not in taken
    }


def why_refused(model: Any) -> str | None:
    """Why a model without a page is not taken. None if it is no model of transformers that reads
    pictures."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for kind, architecture in _architectures().items():
        if architecture in names:
            return REFUSED.get(kind, NOT_LOOKED_AT)
    return None


def _architectures() -> dict[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
