"""GOT-OCR 2.0: a picture, or each crop of one, as one square."""

from __future__ import annotations

from typing import Any

from ..looks import Given, Looks
from .family import Family
from .squares import squares
from .tiny import IMAGE, TEXT, Tiny, square

__all__ = ["GotOcr2"]


class GotOcr2(Family):
    name = "got_ocr2"
    architectures = ("GotOcr2ForConditionalGeneration",)
    example = "stepfun-ai/GOT-OCR-2.0-hf"
    text_models = ("qwen2",)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

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
