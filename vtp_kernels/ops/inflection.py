"""inflection: where a curve of scores bends, and the tokens up to there."""

import math

import torch
from torch import Tensor

from vtp_kernels import reference
from vtp_kernels.selection import Selection

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake

RULES = ("chord", "kneedle", "iqr", "mass")


def inflection(
    curve: Tensor,
    *,
    rule: str = "chord",
    min_keep: int = 1,
    max_keep: int | None = None,
    clip_quantile: float = 0.995,
    sensitivity: float = 1.0,
    mass: float = 0.9,
    backend: str | None = None,
) -> Selection:
    """Sorts each row's scores, finds the knee, keeps everything up to and including it.

    The count differs from row to row and is found on the device, without a sync. Rank order is that
    of `select_topk`; the knee is sought among the finite scores, in float64. `reference.py` states
    each rule to the last rounding.

    Args:
        curve: float [B, N], one score per token in any order (CLS attention, text relevance ...).
        rule: "chord": the point farthest below the chord through both ends of the sorted curve; one
            that is never below it, beyond the rounding of its dtype, has no knee.
            "kneedle": first knee of Kneedle (Satopaa et al. 2011) as the package `kneed` finds it.
            "iqr": scores above Q3 + 1.5 (Q3 - Q1). "mass": smallest set that holds the share `mass`
            of the sum of the positive scores.
        min_keep, max_keep: bounds of the count. Without a knee (flat curve, fewer than 3 finite
            scores, nothing found) the first max_keep are kept, all by default.
        clip_quantile: for "chord" and "kneedle", scores above this quantile count as equal to it
            when the knee is sought, for attention sinks bend the curve. 1.0: off.
        sensitivity: S of "kneedle".
        mass: share for "mass".
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        Selection(indices int64 [B, K] ascending, tail -1; counts int32 [B]), K = min(max_keep, N).

    Raises:
        ValueError: a shape that does not fit, an unknown rule, an option out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: a curve that requires grad, a backend that cannot serve.
    """
    _checks.tensor("curve", curve, "B, N", (_checks.ANY, _checks.ANY))
    check_rule(rule, min_keep, max_keep, clip_quantile, sensitivity, mass)
    _checks.inference_only("inflection", curve)
    backend = choose("inflection", curve, backend)
    if backend != "reference":
        return Selection(
            *kernel("inflection", backend)(
                rowwise(curve), rule, min_keep, max_keep, clip_quantile, sensitivity, mass
            )
        )
    return reference.inflection(
        curve,
        rule=rule,
        min_keep=min_keep,
        max_keep=max_keep,
        clip_quantile=clip_quantile,
        sensitivity=sensitivity,
        mass=mass,
    )


def check_rule(
    rule: str,
    min_keep: int,
    max_keep: int | None,
    clip_quantile: float,
    sensitivity: float,
    mass: float,
) -> None:
    _checks.one_of("rule", rule, RULES)
    _checks.integer("min_keep", min_keep, 0)
    if max_keep is not None:
        _checks.integer("max_keep", max_keep, 0)
        if max_keep < min_keep:
            raise ValueError(f"max_keep must be at least min_keep, {min_keep}, got {max_keep}")
    for name, share in (("clip_quantile", clip_quantile), ("mass", mass)):
        _checks.number(name, share)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"{name} must be within (0, 1], got {share}")
    _checks.number("sensitivity", sensitivity)
    if not 0.0 <= sensitivity < math.inf:
        raise ValueError(f"sensitivity must be finite and at least 0, got {sensitivity}")


def fake_selection(x: Tensor, length: int, max_keep: int | None) -> tuple[Tensor, Tensor]:
    capacity = length if max_keep is None else min(max_keep, length)
    return (
        x.new_empty(x.shape[0], capacity, dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.int32),
    )


@register_fake("inflection")
def _(curve, rule, min_keep, max_keep, clip_quantile, sensitivity, mass):
    return fake_selection(curve, curve.shape[1], max_keep)
