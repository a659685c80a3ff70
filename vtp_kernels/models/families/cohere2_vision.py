"""Command-A Vision and Aya Vision: layers with a sliding window and rotary positions, and others
that see all rows and know no positions. Pictures are cut into tiles, with words between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..towers import AyaTower, CohereTower
from .family import Family
from .looks import Given, Looks
from .squares import folded, tiles_of, tiles_then_whole
from .tiny import IMAGE, TEXT, VISION, Tiny, square

__all__ = ["AyaVision", "Cohere2Vision"]

LIMITS = (
    "VisiPruner: no passive visual tokens in layers with a sliding window",
    "a StaticCache must be shorter than the sliding window",
)


class Cohere2Vision(Family):
    name = "cohere2_vision"
    architectures = ("Cohere2VisionForConditionalGeneration",)
    text_models = ("cohere2",)
    towers = (CohereTower,)
    example = "CohereLabs/command-a-vision-07-2025"
    limits = LIMITS

    def looks(self, given: Given) -> list[Looks]:
        return _looks(given, _least_enlarged)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

        def make() -> Any:
            return Cohere2VisionForConditionalGeneration(
                Cohere2VisionConfig(
                    vision_config=_tower(),
                    text_config=_text(["sliding_attention", "full_attention"] * 3),
                    image_token_id=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"cohere2_vision": Tiny(make, square(112))}


class AyaVision(Family):
    name = "aya_vision"
    architectures = ("AyaVisionForConditionalGeneration",)
    text_models = ("cohere2",)
    towers = (AyaTower,)
    example = "CohereLabs/aya-vision-8b"
    limits = LIMITS

    def looks(self, given: Given) -> list[Looks]:
        return _looks(given, _nearest_shape)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

        def make() -> Any:
            return AyaVisionForConditionalGeneration(
                AyaVisionConfig(
                    vision_config=_tower(),
                    text_config=_text(["full_attention"] * 4 + ["sliding_attention"] * 2),
                    image_token_index=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"aya_vision": Tiny(make, square(112))}


def _looks(given: Given, grid: Callable[[Any, tuple[int, int]], tuple[int, int]]) -> list[Looks]:
    order = folded(given)
    return [
        tiles_then_whole(order, rows * columns, rows, columns)
        for rows, columns in tiles_of(given, order.numel(), grid)
    ]


def _nearest_shape(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles in Aya Vision, as in InternVL and GOT."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as module

    edges = processor.size
    columns, rows = module.get_optimal_tiled_canvas(
        size, (edges.height, edges.width), processor.min_patches, processor.max_patches
    )
    return rows, columns


def _least_enlarged(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles in Command-A Vision: of those as large as the picture, or larger,
    the ones that enlarge it least; where none are, those that make it smaller least. Fewer tiles go
    before more, and then fewer columns."""
    edge, most = processor.size.height, processor.max_patches
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if rows * columns <= most
    ]
    grids.sort(key=lambda grid: grid[0] * grid[1])

    def scale(grid: tuple[int, int]) -> float:
        return min(edge * count / side for count, side in zip(grid, size, strict=True))

    enlarged = [grid for grid in grids if scale(grid) >= 1]
    return min(enlarged, key=scale) if enlarged else max(grids, key=scale)


def _tower() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION, image_size=112, patch_size=14, vision_use_head=False)


def _text(layer_types: list[str]) -> Any:
    from transformers import Cohere2Config

    return Cohere2Config(**TEXT, sliding_window=8, layer_types=layer_types)
