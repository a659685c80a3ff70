"""The engine: where a model's visual tokens are, and how rows leave it. No method here."""

import vtp_kernels.ops.flop_formulas  # noqa: F401  for FlopCounterMode

from .handle import Handle, apply, handle, prune, remove, supported_models
from .reports.report import Report

__all__ = [
    "Handle",
    "Report",
    "apply",
    "handle",
    "prune",
    "remove",
    "supported_models",
]
