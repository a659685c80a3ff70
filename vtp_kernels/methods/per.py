"""Budgets of their own for each picture, or each frame of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtp_kernels._shown import shown

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import PromptRows

__all__ = ["PER", "groups", "left_of", "read_per"]

PER = ("prompt", "picture", "frame")
"""What a budget is for: all visual tokens of a prompt; each picture, and each video, by itself; or
each picture and each frame. Frames that the model merges, as Qwen does two and two, are one."""


def read_per(per: object, where: str) -> str:
    """One of PER; "image" is another word for "picture". ValueError naming `where` otherwise."""
    if per == "image":
        return "picture"
    if per not in PER:
        raise ValueError(f"{where}: got {shown(per)}, expected one of {[*PER, 'image']}")
    return str(per)


def groups(rows: PromptRows, per: str) -> tuple[Tensor, list[list[int]]]:
    """int64 [B, S]: which group of its prompt each visual row is in; and how many visual rows each
    group had when the prompt came in."""
    if per == "prompt":
        return torch.zeros_like(rows.origin), [[count] for count in rows.visual_at_start]
    if per == "frame":
        return rows.unit, rows.unit_counts
    numbers, counts = [], []
    for units, of_units in zip(rows.units, rows.unit_counts, strict=True):
        keys = [(unit.picture, unit.video) for unit in units]
        number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        numbers.append([number[key] for key in keys])
        counts.append([0] * len(number))
        for key, count in zip(keys, of_units, strict=True):
            counts[-1][number[key]] += count
    # What is of no unit is -1, the last one.
    most = max(map(len, numbers))
    table = torch.tensor([[*some, *[-1] * (most + 1 - len(some))] for some in numbers])
    unit = rows.unit
    return rows.moved(table).gather(1, torch.where(unit < 0, most, unit)), counts


def left_of(rows: PromptRows, group: Tensor, at_start: list[list[int]]) -> list[list[int]]:
    """How many rows each group has now. Where another method let some leave before, the host reads
    that: one small tensor."""
    left = rows.visual_now
    if left == rows.visual_at_start:
        return at_start
    if all(len(of_prompt) == 1 for of_prompt in at_start):
        return [[count] for count in left]
    most = max(map(len, at_start))
    found = torch.zeros(len(group), most + 1, dtype=torch.int64, device=group.device)
    number = torch.where(rows.visual & (group >= 0), group, most)
    found.scatter_add_(1, number, torch.ones_like(number))
    return [some[: len(each)] for some, each in zip(found.tolist(), at_start, strict=True)]
