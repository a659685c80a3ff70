"""InternVL 2 to 3.5, and Qianfan-OCR: tiles, and a token that shows a square of patches.

Frames come as pictures.
"""

from __future__ import annotations

from typing import Any

import torch

from ..looks import Given, Looks, View, one_size
from .family import Family
from .tiny import EXPERTS, IMAGE, TEXT, VISION, Tiny, square

__all__ = ["InternVL", "QianfanOcr"]


class InternVL(Family):
    name = "internvl"
    architectures = ("InternVLForConditionalGeneration",)
    example = "OpenGVLab/InternVL3-8B-hf"
    text_models = ("llama", "qwen2", "qwen3", "qwen3_moe")

    def looks(self, given: Given) -> list[Looks]:
        """Tiles that fill the picture, then the whole picture; or this alone."""
        patches = given.tower._patches(given.side**2)
        per_tile, side = len(patches), round(len(patches) ** 0.5)
        # Where a token's patches are, as the model's own shuffling puts them.
        y, x = (patches // given.side).min(1).values, (patches % given.side).min(1).values
        step = given.side // side
        order = torch.empty(side, side, dtype=torch.long)
        order[y // step, x // step] = torch.arange(per_tile)
        looks = []
        for index, run in enumerate(given.runs):
            count, rest = divmod(run, per_tile)
            if rest:
                raise ValueError(
                    f"input_ids: {run} visual tokens follow upon each other, and tiles of pictures "
                    f"have {per_tile}"
                )
            whole = View("whole", order + (count - 1) * per_tile)
            views = (whole,)
            if count > 1:
                rows, columns = _arrangement(given, index, count - 1)
                tiles = torch.arange(rows * columns).view(rows, columns) * per_tile
                tokens = tiles[:, None, :, None] + order[None, :, None, :]
                views = (whole, View("crops", tokens.reshape(rows * side, columns * side)))
            looks.append(Looks(run, views))
        return looks

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


class QianfanOcr(Family):
    name = "qianfan_ocr"
    architectures = ("QianfanOCRForConditionalGeneration",)
    example = "baidu/Qianfan-OCR"
    text_models = ("qwen3",)

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


def _arrangement(given: Given, index: int, tiles: int) -> tuple[int, int]:
    """Rows and columns of a picture's tiles: those that come nearest to its own shape."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as module

    if given.sizes is None or index >= len(given.sizes):
        raise NotImplementedError(
            "images: how InternVL lays out tiles depends on a picture's shape, which its inputs do "
            "not tell; pass the pictures"
        )
    edge = one_size(given.base.config.vision_config.image_size)
    columns, rows = module.get_optimal_tiled_canvas(given.sizes[index], (edge, edge), tiles, tiles)
    if rows * columns != tiles:
        raise NotImplementedError(
            f"pixel_values: {tiles} tiles and a whole picture are not as InternVL's processor "
            "cuts pictures"
        )
    return rows, columns
