"""How a family makes visual tokens of what its vision model puts out; LLaVA-1.5's is the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.vision import SOURCES, Seen

from .layers import Layers

__all__ = ["LastLayer", "Tower", "VideoLlavaTower", "VipTower"]


class Tower:
    """LLaVA-1.5: every picture shows all its tokens, in order.

    Attributes
    ----------
    layers : Layers
        Of its vision model.
    attentions : list of nn.Module
        One a layer.
    """

    #: `model_type` of the vision models that it may have.
    models: tuple[str, ...] = (
        "clip_vision_model",
        "siglip_vision_model",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
    )
    #: Where the model has it.
    place = "vision_tower"
    #: What there is to score by.
    scores: tuple[str, ...] = SOURCES
    #: Whether frames of videos are seen as pictures are.
    videos = False
    #: Whether pictures have tokens according to their size.
    ragged = False

    def __init__(self, base: nn.Module, layers: Layers) -> None:
        self.base, self.layers = base, layers

    @property
    def attentions(self) -> list[nn.Module]:
        return self.layers.attentions

    # ---- attention ----------------------------------------------------------------------------

    def scoring(self, given: Mapping[str, Any]) -> nn.Module:
        """The attention whose output goes into the features, given the arguments of the call that
        encodes the pictures."""
        layer = self._layer(given)
        if layer == 0:
            raise ValueError(
                "vision_feature_layer: the features are taken before the first layer, and no "
                "attention made them; use source='similarity'"
            )
        return self.attentions[layer - 1]

    # ---- what was seen ------------------------------------------------------------------------

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, scores: Tensor | None
    ) -> Seen:
        """`output` is what get_image_features (or get_video_features) returned for the arguments
        `given`, and `scores` what the rows got in `scoring(given)`."""
        hidden = self._states(given, output)
        prefix, lost = self.layers.prefix, self._lost(given)
        patches = slice(max(prefix, lost), None)
        features = self._tokens(modality, hidden[:, patches])
        if scores is not None:
            scores = self._tokens(modality, scores[:, patches, None])[:, :, 0]
        return Seen(
            features=features,
            summary=hidden[:, 0] if self.layers.has_cls else hidden.mean(1),
            attention=scores,
            shows=self._rows(modality, given, *features.shape[:2]),
        )

    def _states(self, given: Mapping[str, Any], output: Any) -> Tensor:
        """[I, M, C]: what the feature layer put out."""
        return output.hidden_states[self._layer(given)]

    def _tokens(self, modality: str, patches: Tensor) -> Tensor:
        """[I, N, C]: visual tokens, of [I, M, C]."""
        return patches

    def _rows(self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        """Seen.shows."""
        return self._shows(given, pictures, tokens)

    def _shows(self, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        order = torch.arange(pictures * tokens).view(pictures, tokens)
        others = max(self.layers.prefix - self._lost(given), 0)  # CLS and registers
        return torch.cat((torch.full((pictures, others), -1), order), dim=1).view(-1)

    def _lost(self, given: Mapping[str, Any]) -> int:
        """Rows in front of the tower's output that the text does not get."""
        return int(self._setting(given, "vision_feature_select_strategy") == "default")

    def _layer(self, given: Mapping[str, Any]) -> int:
        """Which of the tower's hidden states the features are, the first being 0. The deepest,
        where they are several."""
        layers = self._setting(given, "vision_feature_layer")
        states = len(self.attentions) + 1
        return max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))

    def _setting(self, given: Mapping[str, Any], name: str) -> Any:
        value = given.get(name)
        return getattr(self.base.config, name) if value is None else value


class VipTower(Tower):
    """VipLlava: patches alone, without a setting."""

    models = ("clip_vision_model",)

    def _lost(self, given: Mapping[str, Any]) -> int:
        return 1

    def _setting(self, given: Mapping[str, Any], name: str) -> Any:
        old = f"{name}s"  # transformers 5.17
        known = name if hasattr(self.base.config, name) else old
        return super()._setting({known: given.get(name, given.get(old))}, known)


class VideoLlavaTower(Tower):
    """Video-LLaVA. Its videos have a vision model of their own."""

    models = ("clip_vision_model",)
    place = "image_tower"


class LastLayer:
    """Mixed into a tower whose features are all that comes out at its end, and no settings say
    otherwise. A norm may stand behind the last layer."""

    def _layer(self, given: Mapping[str, Any]) -> int:
        return len(self.attentions)

    def _states(self, given: Mapping[str, Any], output: Any) -> Tensor:
        return output.last_hidden_state

    def _lost(self, given: Mapping[str, Any]) -> int:
        return 0
