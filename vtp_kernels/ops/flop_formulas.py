"""What torch's FlopCounterMode counts for the ops that multiply matrices.

As it counts attention: two products, 2 per multiply-accumulate, over all (query, key) pairs that
are computed, causality not subtracted. Values of masks are read.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _native
from vtp_kernels.flops import passive_pairs


def passive_attention(query, key, value, visual, valid, sink, visual_rows, renormalize, *_, **__):
    real = torch.ones_like(visual) if valid is None else valid
    pairs = 0
    for is_visual, is_real in zip(visual, real, strict=True):
        positions = is_visual[is_real].nonzero()[:, 0].tolist()
        images = len(positions)
        pairs += passive_pairs(
            text=int(is_real.sum()) - images,
            visual=images,
            before_visual=positions[-1] + 1 - images if positions else 0,
            sink=sink,
            visual_rows=visual_rows,
            renormalize=renormalize,
        )
    return 2 * pairs * query.shape[1] * query.shape[3]


def attention_scores(query: Tensor, key: Tensor, *_, **__):
    """Logits alone; once, though there may be a second pass."""
    batch, heads, rows, dim = query.shape
    return 2 * batch * heads * rows * key.shape[2] * dim


def token_contribution(query: Tensor, key: Tensor, *_, **__):
    """Logits, the output, and its product with every value."""
    batch, heads, dim = query.shape
    return 3 * 2 * batch * heads * key.shape[2] * dim


for _op, _formula in (
    ("passive_attention", passive_attention),
    ("attention_scores", attention_scores),
    ("attention_topk", attention_scores),
    ("token_contribution", token_contribution),
):
    if _native.defines(_op):
        register_flop_formula(getattr(torch.ops.vtp_kernels, _op), get_raw=True)(_formula)
