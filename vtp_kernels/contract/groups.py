"""Visual tokens of each prompt, each picture or each frame, beside each other."""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.ops import select_topk

from .counts import moved, on_device

__all__ = ["Groups", "marked", "ranked", "taken"]


class Groups:
    """G groups of visual rows, each of a prompt's, padded to the N of the largest.

    Attributes
    ----------
    sizes, prompts : list of int
        Of each group, how many rows it has, and whose they are.
    here : bool [G, N]
        Where there is a row; what stands elsewhere means nothing.
    rows : int64 [G, N]
        The rows in their order, counted over the whole batch.
    """

    def __init__(
        self, rows: Tensor, there: list[list[int]], width: int, backend: str | None
    ) -> None:
        """`there`: the sizes of each prompt's groups. `width`: rows of a prompt."""
        self.rows, self.backend = rows, backend
        self.sizes = [size for of_prompt in there for size in of_prompt]
        self.prompts = [b for b, of_prompt in enumerate(there) for _ in of_prompt]
        self._shape = len(there), width
        self._most = max(map(len, there))
        place = torch.arange(rows.shape[1], device=rows.device)
        self.here = place < moved(torch.tensor(self.sizes), rows.device)[:, None]

    def of(self, x: Tensor) -> Tensor:
        """[G, N, ...] of what each row has, [B, S, ...]."""
        return x.flatten(0, 1)[self.rows]

    def of_prompts(self, x: Tensor) -> Tensor:
        """[G, ...] of what each prompt has, [B, ...]."""
        return x[moved(torch.tensor(self.prompts), x.device)]

    def in_rows(self, chosen: Tensor) -> Tensor:
        """bool [B, S], of bool [G, N]."""
        batch, width = self._shape
        found = chosen.new_zeros(batch * width + 1)
        found[torch.where(chosen & self.here, self.rows, batch * width)] = True
        return found[:-1].view(batch, width)

    def by_prompt(self, targets: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """The same of targets int64 [G, T], with -1 for none, and content [G, T, C], as a decision
        wants it: rows of each prompt int64 [B, T'], and [B, T', C]."""
        batch, width = self._shape
        rows = torch.where(targets < 0, -1, self.rows.gather(1, targets.clamp(min=0)) % width)
        # Of each prompt its groups, and behind the last of them one that is nobody's.
        nobody = len(self.prompts)
        table = [[g for g, b in enumerate(self.prompts) if b == prompt] for prompt in range(batch)]
        table = [[*some, *[nobody] * (self._most - len(some))] for some in table]
        index = moved(torch.tensor(table), rows.device)
        rows = torch.cat((rows, rows.new_full(rows[:1].shape, -1)))
        content = torch.cat((content, content.new_zeros(content[:1].shape)))
        return rows[index].flatten(1), content[index].flatten(1, 2)

    def numbers(self, counts: list[int]) -> Tensor:
        """int64 [G], on the device of the rows."""
        return moved(torch.tensor(counts), self.rows.device)

    # ---- choosing -----------------------------------------------------------------------------

    def best(
        self,
        scores: Tensor,
        counts: list[int] | Tensor,
        among: Tensor | None = None,
    ) -> Tensor:
        """bool [G, N]: of each group the `counts[g]` rows with the highest scores float32 [G, N],
        or all where there are fewer; `among` bool [G, N] alone, if that is given. Equal scores: the
        earlier row; what is not a number ranks last. Counts on the device, int64 [G], wait for
        nothing."""
        width = self.rows.shape[1]
        if isinstance(counts, Tensor):
            k, capacity = counts, width
        else:
            k, capacity = on_device(counts, scores.device), min(max(counts), width)
        among = self.here if among is None else among
        chosen = select_topk(scores, k, candidates=among, capacity=capacity, backend=self.backend)
        return marked(chosen.indices, width)

    def evenly(self, among: Tensor, counts: list[int]) -> Tensor:
        """int64 [G, T]: of the n rows in `among` bool [G, N] of each group every (n / count)-th,
        rounded down, from the first on, `counts[g]` of them; -1 behind the last."""
        device = among.device
        count = self.numbers(counts)[:, None]
        place = torch.arange(max(counts), device=device)
        there = among.sum(1, keepdim=True)
        rank = place * (there // count.clamp(min=1))
        order = (~among).byte().argsort(dim=1, stable=True)
        targets = order.gather(1, rank.clamp(max=among.shape[1] - 1))
        return torch.where((place < count) & (rank < there), targets, -1)

    def first_enough(self, among: Tensor, more: Tensor, counts: list[int]) -> Tensor:
        """bool [G, N]: `among`, or `more` in groups where that has fewer than `counts[g]` rows."""
        return torch.where((among.sum(1) >= self.numbers(counts))[:, None], among, more)

    def where(self, targets: Tensor) -> Tensor:
        """bool [G, N]: the rows that are targets, int64 [G, T]."""
        return marked(targets, self.rows.shape[1])


def marked(indices: Tensor, width: int) -> Tensor:
    """bool [B, width]: True at indices int64 [B, K], of which -1 is none."""
    found = torch.zeros(len(indices), width + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(1, torch.where(indices < 0, width, indices), True)
    return found[:, :width]


def ranked(scores: Tensor, among: Tensor, counts: list[int]) -> Tensor:
    """int64 [B, T]: of each prompt, or group, the `counts[b]` rows of `among` bool [B, N] with the
    highest scores [B, N], the highest first; -1 behind the last. Equal scores: the earlier row;
    what is not a number ranks last."""
    scores = scores.nan_to_num(nan=-torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = (~among).byte().gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, first)[:, : max(counts)]
    place = torch.arange(order.shape[1], device=order.device)
    count = among.sum(1).minimum(moved(torch.tensor(counts), order.device))
    return torch.where(place < count[:, None], order, -1)


def taken(x: Tensor, places: Tensor) -> Tensor:
    """[B, T, C]: the rows of x [B, N, C] at places int64 [B, T]; any where that is -1."""
    return x.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
