"""GOT-OCR 2.0: a picture, or each crop of one, as one square."""

from __future__ import annotations

from typing import Any

from ..towers import ConvolvedTower
from .family import Family
from .looks import Given, Looks, cells, one_size
from .squares import arrangement, side_of, squares, tiles_then_whole
from .tiny import IMAGE, TEXT, Tiny, square

__all__ = ["GotOcr2"]


class GotOcr2(Family):
    name = "got_ocr2"
    architectures = ("GotOcr2ForConditionalGeneration",)
    example = "stepfun-ai/GOT-OCR-2.0-hf"
    text_models = ("qwen2",)
    towers = (ConvolvedTower,)

    def looks(self, given: Given) -> list[Looks]:
        """A picture that is cut comes as its crops and then the whole of it; pages of one prompt
        follow upon each other in the same way, and the pictures tell which of both it is."""
        parts, side = given.told("image").parts, side_of(given)
        counts = [run // (side * side) for run in given.runs]
        if parts == len(counts) or (given.sizes is not None and len(given.sizes) == parts):
            return squares(given)
        if given.sizes is None:
            raise NotImplementedError(
                "images: several squares in one place are the pages, or the crops, of a document, "
                "and its inputs do not tell which; pass the pictures"
            )
        edge = one_size(given.base.config.vision_config.image_size)
        return [
            tiles_then_whole(cells(side, side), n - 1, *arrangement(given, index, n - 1, edge))
            for index, n in enumerate(counts)
        ]

    def lengths(self, given: Given) -> list[int]:
        """Those of each place in the prompt, pages or crops."""
        return given.runs

    def tiny(self) -> dict[str, Tiny]:
        from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, Qwen2Config

        def make() -> Any:
            return GotOcr2ForConditionalGeneration(
                GotOcr2Config(
                    vision_config={
                        "hidden_size": 32,
                        "output_channels": 16,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "image_size": 64,
                        "patch_size": 4,
                        "mlp_dim": 64,
                        "window_size": 4,
                        "global_attn_indexes": [1],
                    },
                    text_config=Qwen2Config(**TEXT),
                    image_token_index=IMAGE,
                )
            )

        return {"got_ocr2": Tiny(make, square(64))}
