"""Loads the compiled library and, where that fails, remembers why.

Importing the extension registers its kernels as `torch.ops.vtp_kernels.*`. A pure-Python install,
or a libtorch older than the library's target, is no error: the reference serves every op then.
"""

import importlib
import json
from typing import NamedTuple

import torch

from vtp_kernels._compiling import constant

OPS = (
    "attention_scores",
    "select_topk",
    "select_diverse",
    "attention_topk",
    "token_contribution",
    "compact_kv",
    "compact_kv_",
    "compact_rows",
    "inflection",
    "cls_inflection",
    "passive_attention",
    "assign_rows",
    "merge_rows",
)

#: Why there is no native library, or None if it is loaded.
missing: str | None = None

try:
    importlib.import_module("vtp_kernels._C")
except ModuleNotFoundError as error:
    if error.name != "vtp_kernels._C":
        raise
    missing = "the native library is not built (no module vtp_kernels._C)"
except ImportError as error:
    missing = f"the native library does not load with torch {torch.__version__}: {error}"


#: What the library says about itself: version, libtorch (the oldest it loads with),
#: compiler, cpu_isa, cuda (the compiler of its CUDA kernels), cuda_archs. Empty without.
build: dict = json.loads(torch.ops.vtp_kernels.build_info()) if missing is None else {}


def defines(op: str) -> bool:
    """Whether the library defines `torch.ops.vtp_kernels.<op>`."""
    return missing is None and torch._C._dispatch_has_kernel(f"vtp_kernels::{op}")


def _has_kernel(op: str, key: str) -> bool:
    name = f"vtp_kernels::{op}"
    return defines(op) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


#: (op, device type) pairs the loaded library has code for.
kernels = frozenset(
    (op, key.lower()) for op in OPS for key in ("CPU", "CUDA") if _has_kernel(op, key)
)


class Image(NamedTuple):
    """What the driver takes the library's CUDA kernels from, for one device.

    Attributes:
        machine: the compute capability the machine code is for, 90 for 9.0.
        ptx: that of the PTX it was compiled from: another one if the driver has compiled it.
        why: None, or why the kernels cannot run there.
    """

    machine: int
    ptx: int
    why: str | None

    def __str__(self) -> str:
        if self.why is not None:
            return f"none: {self.why}"
        if self.machine == self.ptx:
            return f"sm_{self.machine}"
        return f"PTX of sm_{self.ptx}, compiled by the driver for sm_{self.machine}"


#: What the driver answered for CUDA devices asked about so far, by index.
_images: dict[int, Image] = {}


def image(index: int) -> Image:
    """What runs on that CUDA device, if anything does.

    Asks the driver rather than compare compute capabilities: it alone knows which image, or which
    PTX, it would take.
    """
    if missing is not None:
        return Image(0, 0, missing)
    if index not in _images:
        machine, ptx, why = torch.ops.vtp_kernels.cuda_image(index)
        _images[index] = Image(machine, ptx, why or None)
    return _images[index]


@constant
def why_no_image(index: int) -> str | None:
    """Why the library's CUDA kernels cannot run on that device, or None if they can."""
    return image(index).why
