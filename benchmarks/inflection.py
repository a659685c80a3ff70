"""inflection beside a plain torch reading of the chord rule."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal


def eager(curve):
    """Sort, distance below the chord, all up to the knee in the original order, -1 behind."""
    ranked, order = curve.double().sort(dim=1, descending=True, stable=True)
    ranked = ranked.clamp(max=torch.quantile(ranked, 0.995, dim=1, keepdim=True))
    last = curve.shape[1] - 1
    place = torch.arange(last + 1, device=curve.device)
    chord = (ranked[:, :1] - ranked) * last - place * (ranked[:, :1] - ranked[:, -1:])
    depth, knee = chord.max(1, keepdim=True)
    knee = knee.masked_fill(depth <= 0, last)
    kept = order.masked_fill(place > knee, last + 1).sort(dim=1).values
    return kept.masked_fill(kept == last + 1, -1)


def long_tailed(batch: int, length: int, device: str) -> torch.Tensor:
    """Lognormal scores: the long tail that CLS similarity has."""
    return torch.randn(batch, length, device=device).exp()


def case(batch: int, length: int, device: str) -> Case:
    return Case(
        "inflection",
        f"chord, B={batch}, N={length}",
        4 * batch * length + 8 * batch * length,
        lambda: (long_tailed(batch, length, device),),
        lambda curve: vtp.inflection(curve).indices,
        {"torch eager": eager},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    return [case(batch, n, device) for batch in (1, 8, 32) for n in (576, 2880, 10000)]
