"""cls_inflection beside torch: cosine similarity to CLS, then the chord rule."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case
from benchmarks.inflection import eager as eager_knee
from benchmarks.shapes import randn

WIDTH = 1024  # CLIP ViT-L


def eager(features, cls):
    similarity = torch.nn.functional.cosine_similarity(
        features.float(), cls.float()[:, None], dim=-1
    )
    return eager_knee(similarity), similarity


def check(ours, theirs) -> None:
    """Similarities agree; the benchmark of `inflection` checks the knee, on equal curves."""
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def case(batch: int, length: int, dtype: torch.dtype, device: str) -> Case:
    name = str(dtype).removeprefix("torch.")

    def make():
        cls = randn(batch, WIDTH, dtype=dtype, device=device)
        tail = torch.randn(batch, length, 1, device=device).exp() / 8
        features = randn(batch, length, WIDTH, dtype=dtype, device=device) + (
            tail * cls[:, None]
        ).to(dtype)
        return features, cls

    return Case(
        "cls_inflection",
        f"chord, B={batch}, N={length}, C={WIDTH}, {name}",
        batch * (length + 1) * WIDTH * dtype.itemsize,
        make,
        vtp.cls_inflection,
        {"torch eager": eager},
        check,
    )


def cases(device: str) -> list[Case]:
    return [
        case(batch, length, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
        for batch, length in ((1, 576), (8, 576), (1, 2880))
    ]
