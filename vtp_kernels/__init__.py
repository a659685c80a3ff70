"""Visual-token pruning for LLaVA models: exact kernels, and the modules that use them.

The ops need nothing but torch. The model side (`prune`, `apply`, the methods) needs `transformers`
and is imported on first use.
"""

import importlib

from vtp_kernels.flops import flops
from vtp_kernels.info import info
from vtp_kernels.ops import (
    assign_rows,
    attention_scores,
    attention_topk,
    cls_inflection,
    compact_kv,
    compact_rows,
    debug,
    inflection,
    merge_rows,
    passive_attention,
    select_diverse,
    select_topk,
    token_contribution,
)
from vtp_kernels.selection import Selection

__version__ = "0.1.0"

_LAZY = {
    "CDPruner": "vtp_kernels.methods",
    "Chain": "vtp_kernels.methods",
    "DivPrune": "vtp_kernels.methods",
    "FastV": "vtp_kernels.methods",
    "FrameDifference": "vtp_kernels.methods",
    "DART": "vtp_kernels.methods",
    "HiPrune": "vtp_kernels.methods",
    "InflectionPruning": "vtp_kernels.methods",
    "LVPruning": "vtp_kernels.methods",
    "Method": "vtp_kernels.methods",
    "PyramidDrop": "vtp_kernels.methods",
    "RandomPruning": "vtp_kernels.methods",
    "Schedule": "vtp_kernels.methods",
    "VidCom2": "vtp_kernels.methods",
    "SparseVLM": "vtp_kernels.methods",
    "VisPruner": "vtp_kernels.methods",
    "VisiPruner": "vtp_kernels.methods",
    "VisionZip": "vtp_kernels.methods",
    "apply": "vtp_kernels.models",
    "calibrate": "vtp_kernels.methods.calibrate",
    "handle": "vtp_kernels.models",
    "method": "vtp_kernels.methods",
    "picture_grids": "vtp_kernels.models.pictures.grids",
    "prune": "vtp_kernels.models",
    "remove": "vtp_kernels.models",
    "supported_models": "vtp_kernels.models",
}
_LAZY_MODULES = ("plot", "reference")

__all__ = [
    "DART",
    "CDPruner",
    "Chain",
    "DivPrune",
    "FastV",
    "FrameDifference",
    "HiPrune",
    "InflectionPruning",
    "LVPruning",
    "Method",
    "PyramidDrop",
    "RandomPruning",
    "Schedule",
    "Selection",
    "SparseVLM",
    "VidCom2",
    "VisPruner",
    "VisiPruner",
    "VisionZip",
    "apply",
    "assign_rows",
    "attention_scores",
    "attention_topk",
    "calibrate",
    "cls_inflection",
    "compact_kv",
    "compact_rows",
    "debug",
    "flops",
    "handle",
    "inflection",
    "info",
    "merge_rows",
    "method",
    "passive_attention",
    "picture_grids",
    "plot",
    "prune",
    "reference",
    "remove",
    "select_diverse",
    "select_topk",
    "supported_models",
    "token_contribution",
]


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f"vtp_kernels.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'vtp_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
