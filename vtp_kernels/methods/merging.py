"""Rows that leave and are merged into others: what all methods that do so have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from vtp_kernels.contract.groups import Groups
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["MERGED", "Merging", "merged_events"]

MERGED = "merged"
"""What it is called in a call's memory, and among the events of a report."""


class Merging(NamedTuple):
    """Rows `among` bool [G, N] go to the nearest of `targets` int64 [G, T], by the cosine of `keys`
    [G, N, D]; `mode` as of `vtp.merge_rows`."""

    groups: Groups
    targets: Tensor
    among: Tensor
    keys: Tensor
    mode: str

    def into(self, kept: Kept, layer: int, rows: PromptRows) -> Kept:
        """`kept`, whose rows the targets are, with the others merged into these."""
        if not self.targets.shape[1]:
            return kept
        merged, joined = rows.merge(kept, *self)
        noted = rows.memory.setdefault(MERGED, [])
        noted.append((layer, self.groups.prompts, len(rows.visual), self.targets, joined))
        return merged


def merged_events(memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each prompt, how many rows were merged into how many others; waits for the GPU."""
    events = []
    for layer, prompts, batch, targets, joined in memory.get(MERGED, ()):
        event = {"layer": layer, "event": MERGED, "rows": [0] * batch, "into": [0] * batch}
        counts = zip(prompts, joined.tolist(), (targets >= 0).sum(1).tolist(), strict=True)
        for prompt, rows, into in counts:
            event["rows"][prompt] += rows
            event["into"][prompt] += into
        events.append(event)
    return events
