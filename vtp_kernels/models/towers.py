"""Vision towers: where each family's keeps what is asked of it, and which rows show what.

A tower that has a CLS token scores by it. Where there is none (SigLIP, Qwen) all tokens of the
picture stand in for it: their mean, and the attention that they pay. All tokens of a crop are on
its curve, those too that show padding around the picture and get no row.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .vision import Seen

__all__ = ["MODELS", "TOWERS", "Tower", "tower_of"]


class Tower:
    """LLaVA-1.5: every picture shows all its tokens, in order.

    Attributes
    ----------
    attentions : list of nn.Module
        One a layer; none where what it pays cannot be had.
    has_cls : bool
        Whether row 0 of what the layers put out is the CLS token.
    """

    #: `model_type` of vision models whose layers have an attention with q_proj and k_proj.
    models: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model")
    #: What of it scores a picture's tokens.
    scores: tuple[str, ...] = ("attention", "similarity")

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
        hidden = self._states(given, output)
        skipped = self._skipped(given)
        features = hidden[:, skipped:]
        return Seen(
            features=features,
            summary=hidden[:, 0] if self.has_cls else hidden.mean(1),
            attention=None if scores is None else scores[:, skipped:],
            shows=self._shows(given, *features.shape[:2]),
        )

    def _states(self, given: dict[str, Any], output: Any) -> Tensor:
        """[I, M, C]: what the feature layer put out."""
        return output.hidden_states[self._layer(given)]

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


class ResizedTower(Tower):
    """LLaVA-OneVision: as LLaVA-NeXT, but a picture of many crops is scaled down to what nine of
    them have. A row of such a picture shows the token that is nearest to its place."""

    def _shows(self, given: dict[str, Any], pictures: int, tokens: int) -> Tensor:
        config, model = self.base.config, sys.modules[type(self.base).__module__]
        side, edge = round(tokens**0.5), config.vision_config.image_size
        sizes = torch.as_tensor(given["image_sizes"]).tolist()
        grids = [
            self._grid(model, size) if cut else (0, 0)
            for size, cut in zip(sizes, self._cut(given, len(sizes)), strict=True)
        ]
        # Where each token of the crops stands, row and column, goes through the model's own packing
        # and scaling in place of what it looks like.
        packed, _ = self.base.pack_image_features(
            [_places(*grid, side) for grid in grids],
            sizes,
            image_newline=torch.full((2,), -1.0, dtype=torch.float64),
            vision_aspect_ratio=self._setting(given, "vision_aspect_ratio"),
        )
        shows, first = [], 0
        for places, (rows, columns) in zip(packed, grids, strict=True):
            y, x = places[tokens:].round().long().clamp(-1).unbind(1)
            inside = (1 + y // side * columns + x // side) * tokens + y % side * side + x % side
            whole = torch.arange(first, first + tokens)
            shows.append(torch.cat((whole, torch.where(y < 0, -1, first + inside))))
            first += (1 + rows * columns) * tokens
        if first != pictures * tokens or edge // config.vision_config.patch_size != side:
            raise ValueError(
                f"pixel_values: {pictures} crops of {tokens} tokens do not fit image_sizes, which "
                f"make {first // tokens} crops"
            )
        return torch.cat(shows)

    def _cut(self, given: dict[str, Any], pictures: int) -> list[bool]:
        """Which pictures are cut into crops: those that are a prompt's only one."""
        if given.get("batch_num_images") is None:
            return [True] * pictures
        return [count == 1 for count in given["batch_num_images"] for _ in range(count)]

    def _grid(self, model: Any, size: list[int]) -> tuple[int, int]:
        """Rows and columns of crops."""
        config = self.base.config
        return model.get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )


def _places(rows: int, columns: int, side: int) -> Tensor:
    """float64 [1 + rows * columns, side * side, 2]: row and column of every token, counted over
    all crops of a picture. The whole picture comes before them, with any."""
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    places = torch.stack((y, x), -1).view(rows, side, columns, side, 2)
    places = places.transpose(1, 2).reshape(rows * columns, side * side, 2)
    return torch.cat((torch.zeros(1, side * side, 2), places)).double()


class ShuffledTower(Tower):
    """InternVL: a visual token shows a square of patches, and has the mean of what they have."""

    models = ("internvl_vision",)

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.attentions = [layer.attention for layer in base.vision_tower.encoder.layer]
        self.has_cls = True

    def heads(self, attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
        states = getattr(attention, name)(hidden)
        states = getattr(attention, name.replace("proj", "norm"))(states)
        return states.view(*states.shape[:2], attention.num_heads, -1).transpose(1, 2)

    def read(self, given: dict[str, Any], output: Any, scores: Tensor | None) -> Seen:
        seen = super().read(given, output, scores)
        patches = self._patches(seen.features.shape[1]).to(seen.features.device)
        return seen._replace(
            features=seen.features[:, patches].mean(2),
            attention=None if scores is None else seen.attention[:, patches].mean(2),
            shows=torch.arange(len(seen.features) * len(patches)),
        )

    def _patches(self, count: int) -> Tensor:
        """int64 [N, 4]: which of a picture's patches each visual token shows."""
        side = round(count**0.5)
        order = torch.arange(count, dtype=torch.float64).view(1, side, side, 1)
        shuffled = self.base.pixel_shuffle(order, scale_factor=self.base.config.downsample_ratio)
        return shuffled.reshape(-1, shuffled.shape[-1]).long()

    def _states(self, given: dict[str, Any], output: Any) -> Tensor:
        if self._layer(given) == len(self.attentions):
            return output.last_hidden_state  # has a norm behind it, in some models
        return super()._states(given, output)


class PackedTower(Tower):
    """Qwen2.5-VL: pictures of any size, one behind the other, several patches to a visual token.
    There is no CLS; the features are what the last layer of the tower put out, which merges them.

    Its attention is not computed: it goes over windows, with positions of its own.
    """

    models = ("qwen2_5_vl_vision", "qwen2_5_vl")
    scores = ("similarity",)

    def __init__(self, base: nn.Module) -> None:
        self.base, self.attentions, self.has_cls = base, [], False

    def read(self, given: dict[str, Any], output: Any, scores: Tensor | None) -> Seen:
        pictures = output.pooler_output
        features = pad_sequence(list(pictures), batch_first=True)
        lengths = torch.tensor([len(picture) for picture in pictures])
        here = torch.arange(features.shape[1]) < lengths[:, None]
        return Seen(
            features=features,
            summary=torch.stack([picture.mean(0) for picture in pictures]),
            attention=None,
            shows=here.view(-1).nonzero()[:, 0],
            here=None if here.all() else here,
        )


TOWERS: dict[str, type[Tower]] = {
    "llava": Tower,
    "llava_next": CroppedTower,
    "llava_next_video": CroppedTower,
    "llava_onevision": ResizedTower,
    "internvl": ShuffledTower,
    "qwen2_5_vl": PackedTower,
}
MODELS = tuple(dict.fromkeys(name for tower in TOWERS.values() for name in tower.models))


def tower_of(family: str, base: nn.Module) -> Tower | None:
    """What is known of a model's vision tower; None if too little for what methods ask."""
    kind = TOWERS.get(family)
    if kind is None:
        return None
    tower = getattr(base, "vision_tower", None) or base.visual
    if tower.config.model_type not in kind.models:
        return None
    return kind(base)
