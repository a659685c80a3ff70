"""Muon: torch's bits in bfloat16, and what Newton-Schulz steps are for in float32."""

import pytest
import torch

pytest.importorskip("transformers")

from vtp_kernels import machine
from vtp_kernels.pocket_llava import train
from vtp_kernels.pocket_llava.muon import Muon, orthogonal

SHAPES = ((24, 40), (40, 24), (16, 16))


def test_in_bfloat16_it_has_the_bits_of_torch(draw):
    ours = [torch.nn.Parameter(draw.normal(*shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.02, "weight_decay": 0.05}
    optimizers = (
        Muon(ours, torch.bfloat16, **settings),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    )
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = draw.normal(*one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_the_steps_are_a_polynomial_of_the_singular_values(draw, shape):
    """Computed from the singular value decomposition, in float64."""
    matrix = draw.normal(*shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = (left * values) @ right
    result = orthogonal(matrix.float(), torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fast", (True, False))
def test_training_multiplies_in_what_the_machine_is_fast_in(monkeypatch, fast):
    monkeypatch.setattr(machine.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(machine.torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    wanted = torch.bfloat16 if fast else torch.float32
    x = torch.ones(2, 2)
    with train.autocast("cpu"):
        assert (x @ x).dtype == wanted
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    muon, adamw = train.Optimizer([(layer, 1.0)]).parts
    assert muon.dtype == wanted
    assert [p.dim() for part in (muon, adamw) for p in part.param_groups[0]["params"]] == [2, 1]


def test_a_cpu_that_converts_is_not_fast(monkeypatch):
    """torch calls bfloat16 supported on any CPU with AVX-512."""
    monkeypatch.setattr(machine.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(machine.torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for name, fast in (("x86_64", False), ("AMD64", False), ("aarch64", True)):
        monkeypatch.setattr(machine.platform, "machine", lambda name=name: name)
        assert machine.multiplies_bfloat16("cpu") is fast
    assert machine.multiplies_bfloat16("cuda:1")
