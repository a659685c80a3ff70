"""Attention in which keys count as much as a policy says, differentiable in the policy.

How rows are let go while something learns which: they stay where they are, and the policy takes
their keys out of the softmax. With M_ij = policy_j, but 1 on the diagonal, row i gives key j the
weight exp(A_ij) M_ij / sum_k exp(A_ik) M_ik (LVPruning, arXiv 2501.13652, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .projections import project_all, put_out, refuse_sinks, rotate
from .stand_ins import StandIn

__all__ = ["PolicyAttention", "policy_attention"]

# A key that was let go may have had e^30 times the weight of all that stayed before its gradient
# is cut: far beyond what a row gives, and far from what float32 holds.
LARGEST_LOG_WEIGHT = 30.0


def policy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    secant: bool = True,
) -> Tensor:
    """Causal attention under a policy.

    The weights of a layer are never kept: the backward pass computes them anew from queries and
    keys, so that what a layer holds in between grows with the rows, not with their square.

    Parameters
    ----------
    query : float [B, Hq, S, D]
    key, value : float [B, Hkv, S, D]
        Hq is a multiple of Hkv.
    policy : float [B, S]
        0 lets a key go, 1 keeps it. Every row sees itself all the same. Values between are taken
        as 1 going forward.
    valid : bool [B, S] or None
        False for padding.
    scale : float
        Default D ** -0.5.
    secant : bool
        A key that was let go would get the weight w (1 for all that the row sees now) if it had its
        policy back. False: the gradient in its policy is the derivative of the formula above, which
        grows with w: on a trained model w may be in the thousands, and one row that misses its key
        outweighs all others. True: what the row would change by, the derivative's 1 / (1 + w).

    Returns
    -------
    float [B, Hq, S, D]
        Its gradients in query, key and value, and in the policy of keys that stayed, are the
        derivatives of the formula above.
    """
    if valid is not None:
        policy = policy * valid
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _PolicyAttention.apply(query, key, value, policy, valid, scale, secant)


class _PolicyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        policy: Tensor,
        valid: Tensor | None,
        scale: float,
        secant: bool,
    ) -> Tensor:
        mask = _visible(policy > 0)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, policy, valid, output)
        ctx.scale, ctx.secant = scale, secant
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, policy, valid, output = ctx.saved_tensors
        kept = _visible(policy > 0)[:, 0]
        others = _visible(torch.ones_like(policy, dtype=torch.bool) if valid is None else valid)
        others = others[:, 0] & ~_diagonal(policy)
        # Prompt by prompt: all the matrices of a batch would not fit where they can be read fast.
        parts = [
            _backward(grad[b], *(x[b] for x in (*tensors, output, kept, others)), ctx)
            for b in range(len(policy))
        ]
        grads = [torch.stack(column) for column in zip(*parts, strict=True)]
        return (*grads[:3], grads[3].to(policy.dtype), None, None, None)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    kept: Tensor,
    others: Tensor,
    ctx: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one prompt in query, key, value and policy: [H, S, D] thrice, float32 [S].

    `kept` and `others` bool [S, S]: the keys that a row sees, and those a policy has a say in.
    """
    grad = grad.to(value.dtype)
    logits = (query @ key.transpose(1, 2)).float().mul_(ctx.scale)
    total = logits.masked_fill(~kept, -torch.inf).logsumexp(2, keepdim=True)
    weights = logits.sub_(total).clamp_(max=LARGEST_LOG_WEIGHT).exp_()
    # What more of a weight would bring, less what the row would lose to make room for it.
    rise = (grad @ value.transpose(1, 2)).float()
    rise.sub_((grad * output).float().sum(2, keepdim=True)).mul_(weights)
    pull = rise if not ctx.secant else rise / weights.masked_fill(kept, 0.0).add_(1.0)
    grad_policy = pull.sum(0).masked_fill_(~others, 0.0).sum(0)
    weights = weights.masked_fill_(~kept, 0.0).to(value.dtype)
    grad_logits = rise.masked_fill_(~kept, 0.0).mul_(ctx.scale).to(value.dtype)
    return (
        grad_logits @ key,
        grad_logits.transpose(1, 2) @ query,
        weights.transpose(1, 2) @ grad,
        grad_policy,
    )


def _diagonal(like: Tensor) -> Tensor:
    return torch.eye(like.shape[1], dtype=torch.bool, device=like.device)


def _visible(keys: Tensor) -> Tensor:
    """bool [B, 1, S, S]: itself, and earlier rows where `keys` bool [B, S]."""
    causal = torch.ones_like(_diagonal(keys)).tril()
    return ((causal & keys[:, None]) | _diagonal(keys))[:, None]


class PolicyAttention(StandIn):
    """Stands in for a layer's attention: the replaced module's own, or under a policy.

    forward() takes the arguments of a Llama-like attention module, and besides

    policy : float [B, S] or None
        As of `policy_attention`, like `secant`. None: the replaced module itself runs.
    valid : bool [B, S] or None
        False for padding. The attention mask is not looked at. There must be no cache.
    """

    OPTIONS = ("policy", "valid", "secant")

    def __init__(self, attention: nn.Module) -> None:
        refuse_sinks(attention, "a policy on keys")
        super().__init__(attention)

    def attend(
        self,
        plain: Callable[..., Any],
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        policy: Tensor,
        valid: Tensor | None = None,
        secant: bool = True,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        attention = self.replaced
        if past_key_values is not None:
            raise ValueError("past_key_values: a policy is for training, call with use_cache=False")
        query, key, value, gate = project_all(attention, hidden_states)
        query, key = rotate(attention, query, key, *position_embeddings, position_ids)
        output = policy_attention(
            query, key, value, policy, valid=valid, scale=attention.scaling, secant=secant
        )
        return put_out(attention, output.transpose(1, 2).flatten(2), gate), None
