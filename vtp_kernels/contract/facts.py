"""Whether what a method answers can be carried out.

Counts decide shapes, so they must be those of the rows that stay. What the host knows is checked at
once. What only the device knows is read where reading is free, on a CPU, or wanted, after
`vtp.debug(True)`; a GPU checks it by itself, without anybody waiting, and stops if it is not so.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.ops import _checks

from .counts import Counts

__all__ = ["Fact", "asked_stay", "check_fit", "demand", "equal", "host_counts"]


class Fact(NamedTuple):
    """bool [B], and what is wrong with prompt b where it is False."""

    holds: Tensor
    fault: Callable[[int], str]


def demand(where: str, *facts: Fact) -> None:
    """Raise ValueError unless all that is so, or have the GPU stop."""
    first = facts[0].holds
    if not _checks.may_read(first) and first.device.type in ("cpu", "cuda"):
        hint = "counts that are not those of the rows, a last prompt token that would leave, or "
        hint += "content for rows that do; vtp.debug(True) tells which"
        torch._assert_async(torch.stack([x.holds for x in facts]).all(), f"{where}: {hint}")
        return
    for fact in facts:
        if not fact.holds.all():
            b = int(fact.holds.int().argmin())
            raise ValueError(f"{where}, prompt {b}: {fact.fault(b)}")


def equal(what: str, found: Tensor, expected: int | Tensor) -> Fact:
    """That `found` [B] rows of a kind, `what`, are as many as was said."""

    def fault(b: int) -> str:
        said = expected if isinstance(expected, int) else int(expected[b])
        return f"{int(found[b])} {what} stay, and counts say {said}"

    return Fact(found == expected, fault)


def asked_stay(found: Tensor, drafts: int) -> Fact:
    """That the rows whose logits are asked for are among those that stay: `found` [B] of them."""
    what = f"token and the {drafts} drafts behind it" if drafts else "token"
    fault = f"the last prompt {what} must stay, for its logits are asked for"
    return Fact(found == 1 + drafts, lambda b: fault)


def host_counts(where: str, counts: Any, batch: int) -> list[int]:
    """`counts` as a list of ints, one for each prompt."""
    if isinstance(counts, Tensor) or not isinstance(counts, list | tuple):
        more = ", .tolist() makes one of it" if isinstance(counts, Tensor) else ""
        raise TypeError(f"{where}: expected a list of ints, got {shown(counts)}{more}")
    if len(counts) != batch:
        raise ValueError(f"{where}: expected one for each of {batch} prompts, got {len(counts)}")
    for count in counts:
        if type(count) is int:
            continue
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{where}: expected ints, got {shown(count)}")
    return [int(count) for count in counts]


def check_fit(where: str, what: str, counts: Counts, there: Counts) -> None:
    """Raise ValueError if more is to stay than there is, as far as the host can tell."""
    if isinstance(counts, Tensor):
        return
    numbers = [None] * len(counts) if isinstance(there, Tensor) else there
    for b, (count, most) in enumerate(zip(counts, numbers, strict=True)):
        if count < 0 or (most is not None and count > most):
            has = "" if most is None else f" of {most}"
            raise ValueError(f"{where}, prompt {b}: cannot keep {count}{has} {what}")
