"""DINOv2 and DINOv3: CLS, in some models registers, then patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .layers import Layers, Place

__all__ = ["Dinov2Layers", "Dinov3Layers"]


class Dinov2Layers(Layers):
    models = ("dinov2", "dinov2_with_registers")
    places = (
        Place("encoder.layer", "attention", ("q_proj", "k_proj")),
        Place("encoder.layer", "attention.attention", ("query", "key")),  # transformers 5.17
    )

    def _prefix(self) -> int:
        return 1 + getattr(self.model.config, "num_register_tokens", 0)


class Dinov3Layers(Dinov2Layers):
    """Patches are rotated; CLS and registers are not."""

    models = ("dinov3_vit",)
    places = (Place("model.layer", "attention", ("q_proj", "k_proj")),)
    functions = ("apply_rotary_pos_emb",)

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        query, key = super().heads(attention, arguments, from_cls)
        rotated = self.function("apply_rotary_pos_emb")(
            key if from_cls else query, key, *arguments["position_embeddings"]
        )
        return query if from_cls else rotated[0], rotated[1]
