"""cls_inflection: the cosine of every token and CLS, and the knee of these.

A program takes a few tokens, a block of their channels at a time, and reads them once for both the
product with CLS and the norm; the norm of CLS comes along.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inflection import inflect, signed_key
from .tuning import size_class, tuned


@tuned(
    [
        triton.Config({"TOKENS": 16, "CHANNELS": 256}, num_warps=8),
        triton.Config({"TOKENS": 8, "CHANNELS": 512}, num_warps=8),
        triton.Config({"TOKENS": 4, "CHANNELS": 512}, num_warps=4),
        triton.Config({"TOKENS": 2, "CHANNELS": 1024}, num_warps=4),
    ],
    key=["size_class"],
)
@triton.jit(do_not_specialize=["length", "size_class"])
def _similarities(
    features, features_batch, features_token, cls, cls_batch, length, channels, similarity, keys,
    size_class, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(length, TOKENS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    token = tl.program_id(0) % parts * TOKENS + tl.arange(0, TOKENS)
    features += b * features_batch + token.to(tl.int64)[:, None] * features_token
    cls += b * cls_batch
    products = tl.zeros([TOKENS, CHANNELS], tl.float32)
    squares = tl.zeros([TOKENS, CHANNELS], tl.float32)
    cls_squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        mask = (token < length)[:, None] & inside[None, :]
        x = tl.load(features + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cls + channel, mask=inside, other=0.0).to(tl.float32)
        products += x * c[None, :]
        squares += x * x
        cls_squares += c * c
    product = tl.sum(products, axis=1)
    norms = tl.sqrt_rn(tl.sum(squares, axis=1)) * tl.sqrt_rn(tl.sum(cls_squares))
    # A zero vector is similar to nothing.
    cosine = tl.where(norms == 0.0, 0.0, tl.div_rn(product, norms))
    at = b * length + token
    tl.store(similarity + at, cosine, mask=token < length)
    tl.store(keys + at, signed_key(cosine), mask=token < length)


def cls_inflection(
    features: Tensor,
    cls: Tensor,
    rule: str,
    min_keep: int,
    max_keep: int | None,
    clip_quantile: float,
    sensitivity: float,
    mass: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = features.shape
    similarity = features.new_empty(batch, length, dtype=torch.float32)
    keys = features.new_empty(batch, length, dtype=torch.int32)
    if keys.numel() > 0:
        _similarities[lambda meta: (batch * triton.cdiv(length, meta["TOKENS"]),)](
            features,
            features.stride(0),
            features.stride(1),
            cls,
            cls.stride(0),
            length,
            channels,
            similarity,
            keys,
            size_class(batch * length),
        )
    options = (rule, min_keep, max_keep, clip_quantile, sensitivity, mass)
    return *inflect(keys, similarity.dtype, *options), similarity
