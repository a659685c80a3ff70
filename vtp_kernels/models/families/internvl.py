"""InternVL 2 to 3.5, and Qianfan-OCR: tiles, and a token that shows a square of patches.

Frames come as pictures.
"""

from __future__ import annotations

from typing import Any

from ..towers import ShuffledTower
from .family import Family
from .looks import Given, Looks, one_size
from .squares import arrangement, folded, tiles_then_whole
from .tiny import EXPERTS, IMAGE, TEXT, VISION, Tiny, square

__all__ = ["InternVL", "QianfanOcr"]


class InternVL(Family):
    name = "internvl"
    architectures = ("InternVLForConditionalGeneration",)
    example = "OpenGVLab/InternVL3-8B-hf"
    text_models = ("gpt_oss", "llama", "qwen2", "qwen3", "qwen3_moe")
    towers = (ShuffledTower,)
    limits = (
        "around gpt_oss, whose softmax has attention sinks: no method that goes by the attention "
        "of its layers",
    )

    def looks(self, given: Given) -> list[Looks]:
        """Frames of videos come as pictures of one tile."""
        order = folded(given)
        edge = one_size(given.base.config.vision_config.image_size)
        return [
            tiles_then_whole(order, tiles, *arrangement(given, index, tiles, edge))
            for index, tiles in enumerate(self._tiles(given, order.numel()))
        ]

    def lengths(self, given: Given) -> list[int]:
        return given.runs

    def _tiles(self, given: Given, per_tile: int) -> list[int]:
        """Those of each picture besides the whole of it."""
        for run in given.runs:
            if run % per_tile:
                raise ValueError(
                    f"input_ids: {run} visual tokens follow upon each other, and tiles of pictures "
                    f"have {per_tile}"
                )
        return [run // per_tile - 1 for run in given.runs]

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            InternVLConfig,
            InternVLForConditionalGeneration,
            InternVLVisionConfig,
            Qwen2Config,
            Qwen3Config,
            Qwen3MoeConfig,
        )

        def make(text: Any) -> Any:
            return InternVLForConditionalGeneration(
                InternVLConfig(
                    vision_config=InternVLVisionConfig(**VISION, image_size=112, patch_size=14),
                    text_config=text,
                    image_token_id=IMAGE,
                    image_seq_length=16,
                )
            )

        return {
            "internvl": Tiny(lambda: make(Qwen2Config(**TEXT)), square(112)),
            "internvl_qwen3": Tiny(lambda: make(Qwen3Config(**TEXT, head_dim=16)), square(112)),
            "internvl_qwen3_moe": Tiny(
                lambda: make(Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=16)), square(112)
            ),
        }


class QianfanOcr(InternVL):
    name = "qianfan_ocr"
    architectures = ("QianfanOCRForConditionalGeneration",)
    example = "baidu/Qianfan-OCR"
    text_models = ("qwen3",)
    limits = ()

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            QianfanOCRConfig,
            QianfanOCRForConditionalGeneration,
            Qwen3Config,
        )

        def make() -> Any:
            return QianfanOCRForConditionalGeneration(
                QianfanOCRConfig(
                    vision_config=VISION | {"image_size": [112, 112], "patch_size": [14, 14]},
                    text_config=Qwen3Config(**TEXT, head_dim=16),
                    image_token_id=IMAGE,
                    image_seq_length=16,
                )
            )

        return {"qianfan_ocr": Tiny(make, square(112))}
