"""token_contribution: what each token adds to the attention output of one row, in closed form.

With o the output and c_j = concat_h a[h, j] v[h, j],

    alpha_j = <o, c_j> = sum_h a[h, j] <o_h, v[h, j]>
    beta_j = ||c_j||^2 = sum_h a[h, j]^2 ||v[h, j]||^2
    cos(o - c_j, o) = (||o||^2 - alpha_j) / (||o|| sqrt(||o||^2 - 2 alpha_j + beta_j))

A program of _attend takes a split of the keys, one of _combine a query head, one of _compare a few
tokens and all heads. K is read once and V twice. Sums over heads are float64, the cosines of
interest lie within 1e-3 of 1; the dot products below them are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import size_class, tuned

LOG2_E = 1.4426950408889634
TILE = 8192  # elements of keys, or values, that a program holds
SPLITS = tl.constexpr(32)  # splits that a program takes at once


# --- attend -----------------------------------------------------------------------------------


@triton.jit
def _base_of(maximum):
    """What exponents are taken relative to: 0 where every logit is -inf, so that weights are 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@tuned(
    [triton.Config({}, num_warps=8), triton.Config({}, num_warps=4)],
    key=["SPLIT", "DIM", "size_class"],
)
@triton.jit(
    do_not_specialize=["valid_batch", "length", "heads", "kv_heads", "splits", "size_class"]
)
def _attend(
    query, query_batch, query_head, key, key_batch, key_head, key_token,
    value, value_batch, value_head, value_token, valid, valid_batch,
    factor, length, dim, heads, kv_heads, splits, weights, maxima, sums, outputs, size_class,
    SPLIT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Softmax weights in base 2, relative to the split's maximum, and the output that they make."""
    split = tl.program_id(0) % splits
    kv_head = (tl.program_id(0) // splits % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // splits // kv_heads).to(tl.int64)
    token = split * SPLIT + tl.arange(0, SPLIT)
    column = tl.arange(0, DIM)
    attended = token < length
    if valid is not None:
        attended &= tl.load(valid + b * valid_batch + token, mask=attended, other=0) != 0
    mask = attended[:, None] & (column < dim)[None, :]
    row = token.to(tl.int64)[:, None]
    key += b * key_batch + kv_head * key_head
    value += b * value_batch + kv_head * value_head
    keys = tl.load(key + row * key_token + column[None, :], mask=mask, other=0.0)
    values = tl.load(value + row * value_token + column[None, :], mask=mask, other=0.0)
    keys = keys.to(tl.float32)
    values = values.to(tl.float32)
    group = heads // kv_heads
    for i in range(group):
        head = kv_head * group + i
        at = query + b * query_batch + head * query_head + column
        scaled = tl.load(at, mask=column < dim, other=0.0).to(tl.float32) * factor
        logit = tl.where(attended, tl.sum(keys * scaled[None, :], axis=1), float("-inf"))
        maximum = tl.max(logit)
        weight = tl.exp2(logit - _base_of(maximum))
        head += b * heads
        tl.store(weights + head * length + token, weight, mask=token < length)
        tl.store(maxima + head * splits + split, maximum)
        tl.store(sums + head * splits + split, tl.sum(weight))
        output = tl.sum(weight[:, None] * values, axis=0)
        tl.store(outputs + (head * splits + split) * DIM + column, output)


# --- combine ----------------------------------------------------------------------------------


@triton.jit
def _factors(maxima, base, split, splits):
    """What makes weights relative to `base` of those relative to the maximum of a split."""
    return tl.exp2(tl.load(maxima + split, mask=split < splits, other=float("-inf")) - base)


@triton.jit
def _sum_outputs(factor, outputs, split, splits, DIM: tl.constexpr):
    """What splits add to the output of a head, with these factors."""
    at = outputs + split.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    part = tl.load(at, mask=(split < splits)[:, None], other=0.0)
    return tl.sum(factor[:, None] * part, axis=0)


@triton.jit(do_not_specialize=["splits"])
def _combine(maxima, sums, outputs, splits, factors, output, squared, DIM: tl.constexpr):
    """The output of a head, its square, and the factors of the splits' weights."""
    head = tl.program_id(0).to(tl.int64)
    maxima += head * splits
    largest = tl.full([SPLITS], float("-inf"), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        maximum = tl.load(maxima + split, mask=split < splits, other=float("-inf"))
        largest = tl.maximum(largest, maximum)
    base = _base_of(tl.max(largest))

    whole = tl.zeros([DIM], tl.float32)
    total = tl.zeros([SPLITS], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        factor = _factors(maxima, base, split, splits)
        total += factor * tl.load(sums + head * splits + split, mask=split < splits, other=0.0)
        whole += _sum_outputs(factor, outputs + head * splits * DIM, split, splits, DIM)
    inverse_sum = 1.0 / tl.sum(total)  # inf without a valid key; then no token is looked at
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        factor = _factors(maxima, base, split, splits) * inverse_sum
        tl.store(factors + head * splits + split, factor, mask=split < splits)
    whole *= inverse_sum
    tl.store(output + head * DIM + tl.arange(0, DIM), whole)
    wide = whole.to(tl.float64)
    tl.store(squared + head, tl.sum(wide * wide))


# --- compare ----------------------------------------------------------------------------------


@triton.jit
def _alpha_beta(
    value, value_head, value_token, weights, factors, output, b, token, wanted,
    length, dim, heads, kv_heads, splits,
    SPLIT: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of a program's tokens. `value` points to the sequence `b`."""
    column = tl.arange(0, DIM)
    alpha = tl.zeros([HEADS, TOKENS], tl.float64)
    beta = tl.zeros([HEADS, TOKENS], tl.float64)
    group = heads // kv_heads
    rows = value + token.to(tl.int64)[:, None] * value_token + column[None, :]
    for start in range(0, kv_heads, HEADS):
        kv_head = start + tl.arange(0, HEADS).to(tl.int64)
        is_head = kv_head < kv_heads
        mask = is_head[:, None] & wanted[None, :]
        values = tl.load(
            rows[None, :, :] + kv_head[:, None, None] * value_head,
            mask=mask[:, :, None] & (column < dim)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        value_squared = tl.sum(values * values, axis=2).to(tl.float64)
        for i in range(group):
            head = (b * heads + kv_head * group + i)[:, None]
            own = tl.load(output + head * DIM + column[None, :], mask=is_head[:, None], other=0.0)
            product = tl.sum(values * own[:, None, :], axis=2)
            weight = tl.load(weights + head * length + token[None, :], mask=mask, other=0.0)
            split = (token // SPLIT)[None, :]
            weight *= tl.load(factors + head * splits + split, mask=mask, other=0.0)
            wide = weight.to(tl.float64)
            alpha += wide * product.to(tl.float64)
            beta += wide * wide * value_squared
    return tl.sum(alpha, axis=0), tl.sum(beta, axis=0)


@triton.jit
def _add_rest(
    value, value_head, value_token, weights, factors, outputs, output, b, token,
    length, dim, heads, kv_heads, splits, SPLIT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """||o - c_j||^2 and <o - c_j, o> of one token from the contributions of the others: the other
    splits' outputs, which know nothing of it, and the keys of its own split, once more."""
    column = tl.arange(0, DIM)
    own_split = token // SPLIT
    key = own_split * SPLIT + tl.arange(0, SPLIT)
    rows = value + key.to(tl.int64)[:, None] * value_token + column[None, :]
    squared = tl.full([], 0.0, tl.float64)
    dot_output = tl.full([], 0.0, tl.float64)
    for i in range(heads):
        head = b * heads + i
        rest = tl.zeros([DIM], tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)
            is_other = (split < splits) & (split != own_split)
            factor = tl.load(factors + head * splits + split, mask=is_other, other=0.0)
            rest += _sum_outputs(factor, outputs + head * splits * DIM, split, splits, DIM)
        is_other = (key < length) & (key != token)
        weight = tl.load(weights + head * length + key, mask=is_other, other=0.0)
        weight *= tl.load(factors + head * splits + own_split)
        mask = (weight != 0.0)[:, None] & (column < dim)[None, :]  # no padding, of any content
        kv_head = head // (heads // kv_heads) - b * kv_heads
        values = tl.load(rows + kv_head * value_head, mask=mask, other=0.0).to(tl.float32)
        rest += tl.sum(weight[:, None] * values, axis=0)
        wide = rest.to(tl.float64)
        squared += tl.sum(wide * wide)
        dot_output += tl.sum(wide * tl.load(output + head * DIM + column).to(tl.float64))
    return squared, dot_output


@triton.jit
def _sum_heads(squared, heads):
    total = tl.zeros([SPLITS], tl.float64)
    for start in range(0, heads, SPLITS):
        head = start + tl.arange(0, SPLITS)
        total += tl.load(squared + head, mask=head < heads, other=0.0)
    return tl.sum(total)


@tuned(
    [
        triton.Config({"TOKENS": 64}, num_warps=8),
        triton.Config({"TOKENS": 32}, num_warps=8),
        triton.Config({"TOKENS": 16}, num_warps=8),
        triton.Config({"TOKENS": 8}, num_warps=8),
    ],
    key=["SPLIT", "DIM", "KV_HEADS", "size_class"],
)
@triton.heuristics({"HEADS": lambda a: min(max(TILE // a["DIM"] // a["TOKENS"], 1), a["KV_HEADS"])})
@triton.jit(
    do_not_specialize=[
        "valid_batch",
        "candidates_batch",
        "length",
        "heads",
        "kv_heads",
        "splits",
        "size_class",
    ]
)
def _compare(
    value, value_batch, value_head, value_token, valid, valid_batch, candidates, candidates_batch,
    weights, factors, outputs, output, squared, length, dim, heads, kv_heads, splits, cosine, norm,
    size_class, SPLIT: tl.constexpr, DIM: tl.constexpr, KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, TOKENS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.arange(0, TOKENS)
    first = tl.program_id(0) % tiles * TOKENS
    token = first + place
    inside = token < length
    wanted = tl.load(candidates + b * candidates_batch + token, mask=inside, other=0) != 0
    if valid is not None:
        wanted &= tl.load(valid + b * valid_batch + token, mask=inside, other=0) != 0
    value += b * value_batch
    alpha, beta = _alpha_beta(
        value, value_head, value_token, weights, factors, output, b, token, wanted,
        length, dim, heads, kv_heads, splits, SPLIT, DIM, TOKENS, HEADS,
    )  # fmt: skip
    whole = _sum_heads(squared + b * heads, heads)
    rest = whole - 2.0 * alpha + beta
    dot_output = whole - alpha
    contributes = wanted & (beta != 0.0)
    # The closed form subtracts numbers as large as ||o||^2: where less than 0.1 % of that is left,
    # a token that is nearly all of the output, the rest is added up instead.
    is_nearly_all = contributes & (rest < 1e-3 * whole)
    if tl.sum(is_nearly_all.to(tl.int32)) > 0:
        for i in range(TOKENS):
            is_this = is_nearly_all & (place == i)
            if tl.sum(is_this.to(tl.int32)) > 0:
                this_rest, this_dot_output = _add_rest(
                    value, value_head, value_token, weights, factors, outputs, output, b, first + i,
                    length, dim, heads, kv_heads, splits, SPLIT, DIM,
                )  # fmt: skip
                rest = tl.where(is_this, this_rest, rest)
                dot_output = tl.where(is_this, this_dot_output, dot_output)
    # No contribution, as off the candidates: cosine 1. Nothing left to compare: 0.
    lengths = tl.sqrt(rest) * tl.sqrt(whole)
    cosines = tl.where(lengths == 0.0, 0.0, dot_output / lengths)
    cosines = tl.where(contributes, cosines, 1.0).to(tl.float32)
    norms = tl.where(contributes, tl.sqrt(beta), 0.0).to(tl.float32)
    tl.store(cosine + b * length + token, cosines, mask=inside)
    tl.store(norm + b * length + token, norms, mask=inside)


# --- launch -----------------------------------------------------------------------------------


def token_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    candidates: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = query.shape
    kv_heads, length = key.shape[1:3]
    cosine = query.new_empty(batch, length, dtype=torch.float32)
    norm = torch.empty_like(cosine)
    if cosine.numel() == 0:
        return cosine, norm
    width = max(triton.next_power_of_2(dim), 16)
    split = min(TILE // width, 128)
    splits = triton.cdiv(length, split)
    weights = cosine.new_empty(batch, heads, length)
    maxima, sums, factors = (cosine.new_empty(batch, heads, splits) for _ in range(3))
    outputs = cosine.new_empty(batch, heads, splits, width)
    output = cosine.new_empty(batch, heads, width)
    squared = cosine.new_empty(batch, heads, dtype=torch.float64)
    values = (value, value.stride(0), value.stride(1), value.stride(2))
    mask = (valid, 0 if valid is None else valid.stride(0))
    sizes = {"size_class": size_class(length), "SPLIT": split, "DIM": width}
    _attend[(batch * kv_heads * splits,)](
        query,
        query.stride(0),
        query.stride(1),
        key,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        *values,
        *mask,
        scale * LOG2_E,
        *(length, dim, heads, kv_heads, splits),
        *(weights, maxima, sums, outputs),
        **sizes,
    )
    _combine[(batch * heads,)](maxima, sums, outputs, splits, factors, output, squared, DIM=width)
    _compare[lambda meta: (batch * triton.cdiv(length, meta["TOKENS"]),)](
        *values,
        *mask,
        candidates,
        candidates.stride(0),
        *(weights, factors, outputs, output, squared),
        *(length, dim, heads, kv_heads, splits),
        cosine,
        norm,
        KV_HEADS=triton.next_power_of_2(kv_heads),
        **sizes,
    )
    return cosine, norm
