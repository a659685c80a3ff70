"""Rows that took in others: what was put into them, for a reference in which nothing leaves."""

import contextlib
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

import vtp_kernels as vtp
from vtp_kernels.models.passage import prefill


@dataclass(frozen=True)
class MergeAll(vtp.Method):
    """Keep every third visual token; the first of them is the mean of all that leave."""

    layers: tuple = (0,)

    def decision_layers(self, depth):
        return self.layers

    def decide(self, layer, rows):
        rank = rows.visual.cumsum(1) - 1
        stays = rows.visual & (rank % 3 == 0)
        kept = rows.keep_where(stays, [(n + 2) // 3 for n in rows.visual_now])
        leaves = rows.visual & ~stays
        mean = (rows.hidden * leaves[..., None]).sum(1) / leaves.sum(1).clamp(min=1)[:, None]
        first = rows.visual.int().argmax(1)
        targets = torch.where(rows.visual.any(1), first, -1)[:, None]
        return rows.with_content(kept, targets, mean[:, None])


@contextlib.contextmanager
def noting_content():
    """Within: {layer: f}, for MaskedReference: f puts what changed there, as it was put."""
    noted, decide = {}, prefill.decision

    def note(method, layer, rows):
        kept = decide(method, layer, rows)
        if kept is not None and kept.hidden is not None:
            changed = (kept.hidden != rows.hidden).any(-1)
            if rows.valid is not None:
                changed &= rows.valid
            columns = torch.zeros(len(changed), rows.columns, dtype=torch.bool)
            content = kept.hidden.new_zeros(*columns.shape, kept.hidden.shape[-1])
            b, row = changed.nonzero(as_tuple=True)
            columns[b, rows.origin[b, row]] = True
            content[b, rows.origin[b, row]] = kept.hidden[b, row]
            noted.setdefault(layer, partial(torch.where, columns[..., None], content))
        return kept

    with mock.patch.object(prefill, "decision", note):
        yield noted
