"""Loads the Triton kernels when they are first asked for, and remembers where they cannot run.

Whether Triton can serve a GPU is found out by running a kernel there: it takes a driver that Triton
supports, a device it compiles for, and a C compiler for its launchers, and only a launch needs all.
"""

import importlib
import os

import torch

from vtp_kernels._compiling import constant

#: Ops without Triton kernels. select_diverse: one launch for k steps that depend on each other
#: takes barriers among the threads of a block, or of a cluster, which Triton does not have. The
#: others: the reference, which calls torch's own products and sums, serves.
WITHOUT = frozenset({"select_diverse", "assign_rows", "merge_rows"})

#: Why Triton cannot run on the devices asked about so far, or None if it can.
_reasons: dict[str, str | None] = {}


@constant
def why_not(device: str) -> str | None:
    """Why Triton kernels cannot run on `device` ("cpu", "cuda:0"), or None if they can."""
    if device not in _reasons:
        _reasons[device] = _find_out(torch.device(device))
    return _reasons[device]


def _find_out(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for GPUs (a CPU only interprets it, under TRITON_INTERPRET=1)"
    try:
        kernels = importlib.import_module("vtp_kernels.triton")
    except ImportError as error:
        return f"Triton does not load: {error}"
    try:
        kernels.probe(device)
    except Exception as error:  # whatever it is, the reference can serve and info() tells
        return f"Triton cannot run on {device}: {type(error).__name__}: {error}"
    return None
