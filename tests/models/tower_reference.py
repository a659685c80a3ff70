"""What tokens get in a vision tower, told again: whole attention matrices of an eager tower, and
plain means. Nothing of vtp_kernels is used."""

import contextlib
import sys
from unittest import mock

import torch


@contextlib.contextmanager
def eager_weights(attention):
    """Within: the attention weights [B, H, M, S] that this module makes, call by call. Towers that
    pack their pictures call once a segment."""
    module, weights = sys.modules[type(attention).__module__], []
    eager = module.eager_attention_forward

    def note(caller, *args, **kwargs):
        output = eager(caller, *args, **kwargs)
        if caller is attention:
            weights.append(output[1])
        return output

    with mock.patch.object(module, "eager_attention_forward", note):
        yield weights


@contextlib.contextmanager
def eager_calls(attentions):
    """Within: of each of these modules, the weights and keys of its calls, {module: [(weights, keys
    [B, H, S, D])]}."""
    module, calls = sys.modules[type(attentions[0]).__module__], {}
    eager = module.eager_attention_forward

    def note(caller, query, key, *args, **kwargs):
        output = eager(caller, query, key, *args, **kwargs)
        calls.setdefault(caller, []).append((output[1], key))
        return output

    with mock.patch.object(module, "eager_attention_forward", note):
        yield calls


def from_cls(weights, prefix):
    """[I, N]: of one call with CLS in front and `prefix` rows before the patches."""
    (paid,) = weights
    return paid[:, :, 0, prefix:].mean(1)


def from_all(weights, valid=None):
    """[I, N]: of one call, everybody paying that is no padding."""
    (paid,) = weights
    valid = torch.ones(len(paid), paid.shape[2], dtype=torch.bool) if valid is None else valid
    return torch.stack([each[:, rows].mean((0, 1)) for each, rows in zip(paid, valid, strict=True)])


def in_blocks(weights, lengths):
    """Of each picture, [n]: one call for all, in which each attends to itself."""
    (paid,) = weights
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [
        paid[0, :, end - n : end, end - n : end].mean((0, 1))
        for n, end in zip(lengths, ends, strict=True)
    ]


def in_segments(weights, merged, rows, square=4):
    """[N]: of a tower that packs its pictures and merges squares of patches to what `merged` has
    in its own order, and hands over as `rows`, which are told by their values."""
    patches = torch.cat([paid.mean((0, 1, 2)) for paid in weights])
    squares = patches.view(-1, square).mean(1)
    order = [(merged == row).all(-1).nonzero().item() for row in rows]
    return squares[order]


def patches_behind(project, states):
    """Of each row that `project` makes of states [R, C]: which rows of these change it."""
    states = states.detach().requires_grad_()
    rows = project(states).flatten(0, -2)
    found = []
    for row in rows:
        (change,) = torch.autograd.grad(row.sum(), states, retain_graph=True)
        found.append(change.abs().sum(-1).nonzero()[:, 0])
    return found
