"""A pruned prompt as it would be unpruned. M-RoPE gives each row the position that it has there, so
vLLM's own function, asked about the whole prompt, knows the positions of what stays. Nothing of
vLLM is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .budget import KEY

__all__ = ["COLUMNS", "Unpruned", "is_pruned", "of_columns", "to_columns"]

#: A row's place in its image travels beside it, in columns of its own dtype. bfloat16 holds whole
#: numbers up to 256 exactly, and images have thousands of rows: digits to this base.
BASE, COLUMNS = 128, 3


def to_columns(places: Tensor, like: Tensor) -> Tensor:
    """[K, COLUMNS], dtype and device of `like`: the digits of places int64 [K], below BASE ** 3."""
    places = places.to(like.device)
    digits = [places // BASE**n % BASE for n in reversed(range(COLUMNS))]
    return torch.stack(digits, dim=1).to(like.dtype)


def of_columns(columns: Tensor) -> Tensor:
    """int64 [K]: what `to_columns` made columns of."""
    high, middle, low = columns.long().unbind(1)
    return (high * BASE + middle) * BASE + low


def is_pruned(feature: Any) -> bool:
    """Whether an item of a prompt (vLLM's MultiModalFeatureSpec) is an image with a budget."""
    return feature.modality == "image" and feature.data is not None and KEY in feature.data


@dataclass(frozen=True)
class Unpruned:
    """tokens: of the whole prompt. features: where its items are in there. begins: for each item of
    the pruned prompt, by its offset, the offset there. column: int64 [S], where each token of the
    pruned prompt is there, were an image's first rows those that stay."""

    tokens: list[int]
    features: list[Any]
    begins: dict[int, int]
    column: Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], features: Sequence[Any], merge: int) -> Unpruned:
        """`merge`: patches along the side of the square that a row shows."""
        whole, placed, begins, columns, done = [], [], {}, [], 0
        for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
            where = feature.mm_position
            begin = len(whole) + where.offset - done
            begins[where.offset] = begin
            if not is_pruned(feature):
                position = replace(where, offset=begin)
                placed.append(replace(feature, mm_position=position))
                continue
            end = where.offset + where.length
            columns.append(len(whole) + torch.arange(end - done))
            rows = int(feature.data["image_grid_thw"].data.prod()) // merge**2
            whole += tokens[done:end]
            whole += [tokens[where.offset]] * (rows - where.length)
            position = replace(where, offset=begin, length=rows)
            placed.append(replace(feature, mm_position=position))
            done = end
        columns.append(len(whole) + torch.arange(len(tokens) - done))
        whole += tokens[done:]
        return cls(whole, placed, begins, torch.cat(columns))
