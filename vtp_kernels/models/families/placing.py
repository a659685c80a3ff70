"""Where in the prompts pictures stand: they fill the placeholders in turn."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Placed", "placed"]


class Placed(NamedTuple):
    """A picture's place: its number, its prompt, and the columns of its tokens."""

    index: int
    prompt: int
    columns: Tensor


def placed(
    lengths: list[int], rows: Tensor, what: str = "pictures", copied: bool = False
) -> list[Placed]:
    """Pictures of so many tokens fill the placeholders bool [B, S] of the prompts in turn.

    copied: prompts may be there several times, one copy after the other, as generate() repeats
    them, and copies show the same.
    """
    total, once = int(rows.sum()), sum(lengths)
    copies = total // once if copied and once and total % once == 0 else 1
    found, first, last = [], 0, 0
    for prompt, row in enumerate(rows):
        columns = row.nonzero()[:, 0]
        if prompt % max(copies, 1) == 0:
            first = last
        index = first
        while len(columns):
            if index == len(lengths) or lengths[index] > len(columns):
                raise ValueError(
                    f"input_ids: the {int(row.sum())} visual tokens of prompt {prompt} are not "
                    f"those of whole {what}; the {what} have {lengths} tokens"
                )
            found.append(Placed(index, prompt, columns[: lengths[index]]))
            columns = columns[lengths[index] :]
            index += 1
        last = index
    if last < len(lengths):
        raise ValueError(
            f"input_ids: no visual tokens for {len(lengths) - last} of {len(lengths)} {what}"
        )
    return found
