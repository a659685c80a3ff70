"""That a test under the id "emulated" does run the CUDA kernels, and nothing does afterwards."""

import pytest
import torch

import vtp_kernels as vtp
from emulator import build, serving

pytestmark = pytest.mark.skipif(serving.why_not() is not None, reason=str(serving.why_not()))


def launches() -> int:
    return sum(build.load("plain").launches().values())


def test_serving_is_scoped():
    x, rows = torch.arange(24.0).view(1, 12, 2), torch.tensor([[3, 5]])
    before = launches()
    with serving.serving():
        (emulated,) = vtp.compact_rows([x], rows, backend="native")
        during = launches()
    (native,) = vtp.compact_rows([x], rows, backend="native")
    assert torch.equal(emulated, native) and emulated.tolist() == [[[6.0, 7.0], [10.0, 11.0]]]
    assert (during, launches()) == (before + 1, before + 1)


def test_float64_is_refused():
    with serving.serving(), pytest.raises(RuntimeError, match="curve must be float16, bfloat16 or"):
        vtp.inflection(torch.zeros(1, 5, dtype=torch.float64), backend="native")
