"""The backends that a test of an op runs on: all that this machine has."""

import os

import pytest
import torch

from emulator import cases, serving
from vtp_kernels.ops._dispatch import BACKENDS, why_not

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs(op: str) -> list:
    """Parameters (device, backend, emulated) of every run of a test of `op`; emulated is False or
    the architecture that is emulated."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = [
        pytest.param(
            *(device, backend, False),
            id=f"{device}-{backend}",
            marks=pytest.mark.gpu if device == "cuda" else (),
        )
        for device in devices
        for backend in BACKENDS
        if why_not(op, backend, device) is None
    ]
    runs_emulated = op in cases.OPS and why_not(op, "native", "cpu") is None and not INTERPRETED
    if runs_emulated and serving.why_not() is None:
        for architecture in cases.ARCHITECTURES.get(op, (90,)):
            name = "emulated" if architecture == 90 else f"emulated-sm_{architecture}"
            found.append(pytest.param("cpu", "native", architecture, id=name))
    return found
