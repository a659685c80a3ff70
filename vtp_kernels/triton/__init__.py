"""The ops as Triton kernels, for GPUs that the native library has no image for.

One file an op, as in csrc/. Each has kernels, which know no torch, and a launcher with the
arguments of the native op; `library` makes the launchers `torch.ops.vtp_kernels_triton.<op>`.
Importing this package imports Triton.
"""

from vtp_kernels.triton.library import probe, register
from vtp_kernels.triton.select_topk import select_topk

__all__ = ["probe"]

for _launcher in (select_topk,):
    register(_launcher)
