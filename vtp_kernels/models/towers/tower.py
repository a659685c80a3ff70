"""How a family makes visual tokens of what its vision model puts out; LLaVA-1.5's is the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.vision import SCORES, SOURCES, Ask, Seen

from .layers import Layers

__all__ = ["LastLayer", "Tower", "VideoLlavaTower", "VipTower", "seen_whole"]


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
    #: What there is to score by; and why not by the rest, where that is not all.
    scores: tuple[str, ...] = SOURCES
    unscored = ""
    #: Whether vectors of patches become those of tokens, as numbers do, and tokens stand in rows
    #: and columns; and whether all layers are known, or that of the features alone.
    vectors = True
    all_layers = True
    #: Whether frames of videos are seen as pictures are.
    videos = False
    #: Whether pictures have tokens according to their size.
    ragged = False

    def __init__(self, base: nn.Module, layers: Layers) -> None:
        self.base, self.layers = base, layers

    @classmethod
    def gives(cls) -> set[str]:
        """What methods may need of it, see `Method.needs_tower`."""
        given = {"similarity", "hidden"}
        given |= set(SCORES) if "attention" in cls.scores else set()
        given |= {"keys", "grids"} if cls.vectors else set()
        return given | ({"layers"} if cls.all_layers else set())

    @staticmethod
    def is_known(base: nn.Module) -> bool:
        """Whether a model, whose vision model is known, makes visual tokens as it is told here."""
        return True

    @property
    def attentions(self) -> list[nn.Module]:
        return self.layers.attentions

    # ---- what is asked ------------------------------------------------------------------------

    def check(self, ask: Ask) -> None:
        """Raise NotImplementedError or ValueError, naming what was set, for what the tower cannot
        give whatever pictures come."""
        why = ""
        if ask.what in SCORES and "attention" not in self.scores:
            why = f"{self.unscored}. It can be asked for {', '.join(self.scores)}"
        elif ask.what == "cls" and not self.layers.has_cls:
            why = f"a {self.layers.model.config.model_type!r} vision tower has no CLS"
        elif ask.what in ("keys", "hidden") and ask != Ask("hidden") and not self.vectors:
            why = "it is not known here how vectors of its patches become those of visual tokens"
        elif ask.layer is not None and not self.all_layers:
            why = "only the layer whose output the features are is known here"
        if why:
            raise NotImplementedError(
                f"{ask.setting or 'vision_source'}: asks the vision tower for {ask.what}: {why}"
            )
        if ask.layer is not None:
            ask.index(len(self.attentions))

    def module_of(self, ask: Ask, modality: str, given: Mapping[str, Any]) -> nn.Module | None:
        """The attention of which that is asked, or the block whose output is, given the arguments
        of the call that encodes the pictures; None where the features tell."""
        if ask.what == "similarity" or ask == Ask("hidden"):
            return None
        if ask.layer is None:
            return self.scoring(modality, given)
        layers = self.layers_of(modality)
        modules = layers.blocks if ask.what == "hidden" else layers.attentions
        return modules[ask.index(len(modules))]

    def layers_of(self, modality: str) -> Layers:
        """Those that see pictures, or videos."""
        return self.layers

    def scoring(self, modality: str, given: Mapping[str, Any]) -> nn.Module:
        """The attention whose output goes into the features."""
        layer = self._layer(given)
        if layer == 0:
            raise ValueError(
                "vision_feature_layer: the features are taken before the first layer, and no "
                "attention made them; use source='similarity'"
            )
        return self.layers_of(modality).attentions[layer - 1]

    # ---- what was seen ------------------------------------------------------------------------

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        """`output` is what get_image_features (or get_video_features) returned for the arguments
        `given`, and `looked` what was asked, of the tower's rows, as `Layers` gives it."""
        hidden = self._states(given, output)
        prefix, lost = self.layers.prefix, self._lost(given)
        patches = slice(max(prefix, lost), None)
        features = self._tokens(modality, given, hidden[:, patches])
        values = {}
        for ask, rows in looked.items():
            rows = rows[:, patches]
            vectors = rows if rows.dim() == 3 else rows[:, :, None]
            tokens = self._tokens(modality, given, vectors)
            values[ask] = tokens.view(*features.shape[:2], *rows.shape[2:])
        return Seen(
            features=features,
            summary=hidden[:, 0] if self.layers.has_cls else hidden.mean(1),
            values=values,
            shows=self._rows(modality, given, *features.shape[:2]),
            grids=self._lines(modality, given, *features.shape[:2]),
        )

    def _lines(
        self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int
    ) -> list[tuple[int, int]] | None:
        """Seen.grids: squares, of square pictures."""
        pixels = given.get("pixel_values_videos") if modality == "video" else None
        pixels = given.get("pixel_values") if pixels is None else pixels  # transformers 5.17
        side = round(tokens**0.5)
        square = isinstance(pixels, Tensor) and pixels.shape[-1] == pixels.shape[-2]
        return [(side, side)] * pictures if square and side * side == tokens else None

    def _states(self, given: Mapping[str, Any], output: Any) -> Tensor:
        """[I, M, C]: what the feature layer put out."""
        return output.hidden_states[self._layer(given)]

    def handed_on(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """By modality, bool [F] on the CPU: which of the rows that were encoded a call of the model
        with these arguments hands on to its text; all of those that are not named."""
        return {}

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        """[I, N, C]: visual tokens, of [I, M, C]."""
        return patches

    def _rows(self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        """Seen.shows."""
        return self.shows(given, pictures, tokens)

    def shows(self, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        """Seen.shows of so many pictures, given the arguments of the call that encodes them."""
        others = max(self.layers.prefix - self._lost(given), 0)  # CLS and registers
        return _in_order(pictures, tokens, others)

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
    """Video-LLaVA. Its videos have a vision model of their own, and CLS of a frame is a row."""

    models = ("clip_vision_model",)
    place = "image_tower"
    videos = True

    def __init__(self, base: nn.Module, layers: Layers) -> None:
        super().__init__(base, layers)
        self._of_videos = type(layers)(getattr(base.video_tower, "vision_model", base.video_tower))

    def layers_of(self, modality: str) -> Layers:
        return self.layers if modality == "image" else self._of_videos

    def _rows(self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        if modality == "image":
            return super()._rows(modality, given, pictures, tokens)
        return _in_order(pictures, tokens, self._of_videos.prefix)


class LastLayer:
    """Mixed into a tower whose features are all that comes out at its end, and no settings say
    otherwise. A norm may stand behind the last layer."""

    def _layer(self, given: Mapping[str, Any]) -> int:
        return len(self.attentions)

    def _states(self, given: Mapping[str, Any], output: Any) -> Tensor:
        return output.last_hidden_state

    def _lost(self, given: Mapping[str, Any]) -> int:
        return 0


def seen_whole(features: Tensor, values: Mapping[Ask, Tensor]) -> Seen:
    """Of pictures all of whose tokens become rows, in order; their mean stands for CLS."""
    return Seen(features, features.mean(1), values, torch.arange(features.shape[:2].numel()))


def _in_order(pictures: int, tokens: int, others: int) -> Tensor:
    """Seen.shows: rows that show nothing come before the tokens of each picture."""
    order = torch.arange(pictures * tokens).view(pictures, tokens)
    return torch.cat((torch.full((pictures, others), -1), order), dim=1).view(-1)
