"""cls_inflection: cosines against float64, the selection bit for bit that of inflection."""

import math

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import reference

OP = "cls_inflection"


def check(features, cls, backend, **options):
    """Compares similarities with float64, the selection with `inflection` of the same curve.

    2e-6 absolute: a cosine is at most 1 and its three float32 sums over C <= 4096 terms are each
    known to a few float32 roundings of 6e-8.
    """
    selection, similarity = vtp.cls_inflection(features, cls, **options, backend=backend)
    want = reference.cls_inflection(features.double(), cls.double())[1]
    exact = features.dtype == torch.float64
    assert similarity.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(
        similarity.double(), want, rtol=0, atol=1e-12 if exact else 2e-6, equal_nan=True
    )
    curve = vtp.inflection(similarity, **options, backend=backend)
    assert torch.equal(selection.indices, curve.indices)
    assert torch.equal(selection.counts, curve.counts)
    return selection, similarity


@pytest.mark.parametrize("length", (0, 1, 2, 31, 576, 577, 2880, 10000))
def test_lengths(draw, backend, length):
    cls = draw.normal(2, 48)
    check(draw.normal(2, length, 48) + 0.3 * cls[:, None], cls, backend)


@pytest.mark.parametrize("channels", (1, 3, 64, 80, 1000, 1024, 4096))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_channels_and_dtypes(draw, backend, channels, dtype):
    check(draw.normal(3, 60, channels, dtype=dtype), draw.normal(3, channels, dtype=dtype), backend)


@pytest.mark.parametrize("rule", ("chord", "kneedle", "iqr", "mass"))
def test_options(draw, backend, rule):
    features, cls = draw.normal(4, 300, 32), draw.normal(4, 32)
    check(features, cls, backend, rule=rule)
    check(features, cls, backend, rule=rule, min_keep=20, max_keep=40)
    options = {"clip_quantile": 0.9, "sensitivity": 2.5, "mass": 0.4}
    check(features, cls, backend, rule=rule, **options)


def test_reference_equals_loops(draw):
    features, cls = draw.normal(2, 9, 5, dtype=torch.float64), draw.normal(2, 5).double()
    _, similarity = reference.cls_inflection(features, cls)
    for b in range(2):
        for n in range(9):
            f, c = features[b, n].tolist(), cls[b].tolist()
            cosine = sum(x * y for x, y in zip(f, c, strict=True)) / math.hypot(*f) / math.hypot(*c)
            assert abs(similarity[b, n].item() - cosine) < 1e-14


def test_keeps_the_tokens_that_look_like_cls(draw, backend):
    cls = draw.normal(2, 256)
    features = draw.normal(2, 576, 256)
    chosen = [3, 77, 200, 201, 575]
    features[:, chosen] += 4 * cls[:, None]
    selection, _ = check(features, cls, backend, clip_quantile=1.0)
    for b in range(2):
        kept = set(selection.indices[b, : selection.counts[b]].tolist())
        assert kept >= set(chosen) and len(kept) < 100  # 7 to 36 in 300 draws


def test_zero_vectors_and_nan(draw, backend):
    features, cls = draw.normal(3, 40, 16), draw.normal(3, 16)
    features[0, 5] = 0.0
    features[1, 7] = math.nan
    cls[2] = 0.0
    _, similarity = check(features, cls, backend)
    assert similarity[0, 5].item() == 0.0
    assert math.isnan(similarity[1, 7].item())
    assert torch.equal(similarity[2], torch.zeros_like(similarity[2]))


def test_scale_does_not_matter(draw, backend):
    """Squares of 1e-15 and 1e15 are within float32; a power of two changes no bit."""
    features, cls = draw.normal(2, 100, 64), draw.normal(2, 64)
    _, plain = check(features, cls, backend)
    for factor in (2.0**-50, 2.0**50):
        _, scaled = vtp.cls_inflection(features * factor, cls, backend=backend)
        torch.testing.assert_close(scaled, plain, rtol=0, atol=2e-7)


def test_strides(draw, backend):
    features, cls = draw.normal(2, 50, 64), draw.normal(2, 64)
    _, similarity = check(features, cls, backend)
    # [CLS, patches] of one tower output, and its transposed layout, as users slice them
    tower = torch.cat((cls[:, None], features), dim=1)
    layouts = (tower, tower.transpose(1, 2).contiguous().transpose(1, 2))
    for output in layouts:
        _, got = check(output[:, 1:], output[:, 0], backend)
        torch.testing.assert_close(got, similarity, rtol=0, atol=1e-6)
    odd = draw.normal(2, 50, 65)
    odd[..., 1:] = features
    _, got = check(odd[..., 1:], cls, backend)
    torch.testing.assert_close(got, similarity, rtol=0, atol=1e-6)


def test_empty_batch(draw, backend):
    check(draw.normal(0, 12, 8), draw.normal(0, 8), backend)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": torch.zeros(2, 9)}, ValueError, r"features must have shape \[B, N, C\]"),
        ({"features": torch.zeros(2, 9, 4).int()}, TypeError, "features must be float16"),
        ({"cls": torch.zeros(2, 5)}, ValueError, r"cls must have shape .* got \[2, 5\]"),
        ({"cls": torch.zeros(1, 4)}, ValueError, "cls must have shape"),
        ({"cls": torch.zeros(2, 4).half()}, TypeError, "cls must have the dtype of features"),
        ({"cls": torch.zeros(2, 4, device="meta")}, ValueError, "cls must be on cpu"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"features": torch.zeros(2, 9, 4), "cls": torch.zeros(2, 4), **change}
    with pytest.raises(error, match=message):
        vtp.cls_inflection(**arguments)
