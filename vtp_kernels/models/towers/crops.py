"""LLaVA-NeXT and LLaVA-OneVision: pictures cut into crops, and frames of videos scaled down."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .tower import Tower

__all__ = ["CroppedTower", "NextVideoTower", "ResizedTower", "places_of", "tokens_at"]


class CroppedTower(Tower):
    """LLaVA-NeXT: a picture is seen as a whole and in crops, each a picture of its own here. The
    rows of the crops are put together, and an `image_newline` ends each."""

    def shows(self, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
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
        packed = self._packed(
            order.split(crops),
            sizes,
            vision_feature_select_strategy=self._setting(given, "vision_feature_select_strategy"),
            image_newline=torch.full((1,), -1.0, dtype=torch.float64),
        )
        return torch.cat(packed).view(-1).long()

    def _packed(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return self.base.pack_image_features(*args, **kwargs)[0]


class NextVideoTower(CroppedTower):
    """LLaVA-NeXT-Video: a token of a frame shows a square of patches, put together as the
    configuration says, and has the mean of what they have."""

    videos = True

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        if modality == "image":
            return patches
        side = round(patches.shape[1] ** 0.5)
        plane = patches.transpose(1, 2).unflatten(2, (side, side))
        return avg_pool2d(plane, self.base.config.spatial_pool_stride).flatten(2).transpose(1, 2)

    def _rows(self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        if modality == "image":
            return self.shows(given, pictures, tokens)
        return torch.arange(pictures * tokens)


class ResizedTower(Tower):
    """LLaVA-OneVision: as LLaVA-NeXT, but a picture of many crops is scaled down to what nine of
    them have. A row of such a picture shows the token that is nearest to its place. Frames of
    videos are scaled to half of their height and width, with one `image_newline` behind them all.
    """

    videos = True

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        # The model scales what the projector made; what the tower saw is scaled alike.
        return patches if modality == "image" else self.base.apply_pooling(patches)

    def _rows(self, modality: str, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        if modality == "image":
            return self.shows(given, pictures, tokens)
        pixels = given.get("pixel_values_videos")
        videos = len(given["pixel_values"] if pixels is None else pixels)  # transformers 5.17
        order = torch.arange(pictures * tokens).view(videos, -1)
        return torch.cat((order, torch.full((videos, 1), -1)), dim=1).view(-1)

    def shows(self, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
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
            [places_of(*grid, side) for grid in grids],
            sizes,
            image_newline=torch.full((2,), -1.0, dtype=torch.float64),
            vision_aspect_ratio=self._setting(given, "vision_aspect_ratio"),
        )
        shows, first = [], 0
        for places, (rows, columns) in zip(packed, grids, strict=True):
            shown = tokens_at(places, columns, side)
            shows.append(torch.where(shown < 0, -1, first + shown))
            first += (1 + rows * columns) * tokens
        if first != pictures * tokens or edge // config.vision_config.patch_size != side:
            raise ValueError(
                f"pixel_values: {pictures} crops of {tokens} tokens do not fit image_sizes, which "
                f"make {first // tokens} crops"
            )
        return torch.cat(shows)

    def _cut(self, given: Mapping[str, Any], pictures: int) -> list[bool]:
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


def places_of(rows: int, columns: int, side: int) -> Tensor:
    """float64 [1 + rows * columns, side * side, 2]: row and column of every token, counted over
    all crops of a picture. The whole picture comes before them, with any."""
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    places = torch.stack((y, x), -1).view(rows, side, columns, side, 2)
    places = places.transpose(1, 2).reshape(rows * columns, side * side, 2)
    return torch.cat((torch.zeros(1, side * side, 2), places)).double()


def tokens_at(places: Tensor, columns: int, side: int) -> Tensor:
    """int64 [R]: the token nearest to each of a picture's rows, of which the first are those of the
    whole and the others come with the places float64 [R, 2] that `places_of` gave its tokens, in
    crops that stand in so many columns; -1 where a place is negative."""
    tokens = side * side
    y, x = places[tokens:].round().long().clamp(-1).unbind(1)
    inside = (1 + y // side * columns + x // side) * tokens + y % side * side + x % side
    return torch.cat((torch.arange(tokens), torch.where(y < 0, -1, inside)))
