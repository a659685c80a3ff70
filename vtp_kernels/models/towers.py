"""Vision towers: where each family's keeps what is asked of it, and which rows show what.

A tower that has a CLS token scores by it. Where there is none (SigLIP) all tokens together stand in
for it: their mean, and the attention that they pay.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .vision import Seen

__all__ = ["MODELS", "TOWERS", "Tower", "tower_of"]

# Vision models whose layers have an attention with q_proj and k_proj.
MODELS = ("clip_vision_model", "siglip_vision_model")


class Tower:
    """LLaVA-1.5: every picture shows all its tokens, in order.

    Attributes
    ----------
    attentions : list of nn.Module
        One a layer.
    has_cls : bool
        Whether row 0 of what the layers put out is the CLS token.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        model = getattr(base.vision_tower, "vision_model", base.vision_tower)
        self.attentions = [layer.self_attn for layer in model.encoder.layers]
        self.has_cls = hasattr(model.embeddings, "class_embedding")

    # ---- attention ----------------------------------------------------------------------------

    def scoring(self, given: dict[str, Any]) -> nn.Module:
        """The attention whose output goes into the features, given the arguments of
        get_image_features."""
        layer = self._layer(given)
        if layer == 0:
            raise ValueError(
                "vision_feature_layer: the features are taken before the first layer, and no "
                "attention made them; use source='similarity'"
            )
        return self.attentions[layer - 1]

    def scoring_rows(self, rows: int) -> int:
        """How many rows score, from row 0 on."""
        return 1 if self.has_cls else rows

    def heads(self, attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
        """[I, H, M, D]: the queries ("q_proj") or keys of rows hidden [I, M, C]."""
        states = getattr(attention, name)(hidden)
        return states.view(*states.shape[:2], attention.num_heads, -1).transpose(1, 2)

    # ---- what was seen ------------------------------------------------------------------------

    def read(self, given: dict[str, Any], output: Any, scores: Tensor | None) -> Seen:
        """`output` is what get_image_features returned for the arguments `given`."""
        hidden = output.hidden_states[self._layer(given)]
        skipped = self._skipped(given)
        features = hidden[:, skipped:]
        return Seen(
            features=features,
            summary=hidden[:, 0] if self.has_cls else hidden.mean(1),
            attention=None if scores is None else scores[:, skipped:],
            shows=self._shows(given, *features.shape[:2]),
        )

    def _shows(self, given: dict[str, Any], pictures: int, tokens: int) -> Tensor:
        order = torch.arange(pictures * tokens).view(pictures, tokens)
        if self.has_cls and self._setting(given, "vision_feature_select_strategy") == "full":
            order = torch.cat((torch.full((pictures, 1), -1), order), dim=1)
        return order.view(-1)

    def _skipped(self, given: dict[str, Any]) -> int:
        """Rows of the tower's output that are no visual tokens with a score: CLS."""
        strategy = self._setting(given, "vision_feature_select_strategy")
        return 1 if self.has_cls or strategy == "default" else 0

    def _layer(self, given: dict[str, Any]) -> int:
        """Which of the tower's hidden states the features are, the first being 0. The last named,
        where they are several."""
        layer = self._setting(given, "vision_feature_layer")
        layer = layer if isinstance(layer, int) else layer[-1]
        return layer % (len(self.attentions) + 1)

    def _setting(self, given: dict[str, Any], name: str) -> Any:
        value = given.get(name)
        return getattr(self.base.config, name) if value is None else value


class CroppedTower(Tower):
    """LLaVA-NeXT: a picture is seen as a whole and in crops, each a picture of its own here. The
    rows of the crops are put together, and an `image_newline` ends each."""

    def _shows(self, given: dict[str, Any], pictures: int, tokens: int) -> Tensor:
        config, model = self.base.config, sys.modules[type(self.base).__module__]
        side, edge = round(tokens**0.5), config.vision_config.image_size
        sizes = torch.as_tensor(given["image_sizes"]).tolist()
        order = torch.arange(pictures * tokens, dtype=torch.float64).view(pictures, tokens, 1)
        crops = [
            model.image_size_to_num_patches(size, config.image_grid_pinpoints, edge)
            for size in sizes
        ]
        if sum(crops) != pictures or side * side != tokens:
            raise ValueError(
                f"pixel_values: {pictures} crops of {tokens} tokens do not fit image_sizes, which "
                f"make {sum(crops)} crops"
            )
        # The model's own packing, told which token is which instead of what it looks like.
        packed, _ = self.base.pack_image_features(
            order.split(crops),
            sizes,
            vision_feature_select_strategy=self._setting(given, "vision_feature_select_strategy"),
            image_newline=torch.full((1,), -1.0, dtype=torch.float64),
        )
        return torch.cat(packed).view(-1).long()


TOWERS: dict[str, type[Tower]] = {"llava": Tower, "llava_next": CroppedTower}


def tower_of(family: str, base: nn.Module) -> Tower | None:
    """What is known of a model's vision tower; None if too little for what methods ask."""
    if family not in TOWERS or base.vision_tower.config.model_type not in MODELS:
        return None
    return TOWERS[family](base)
