"""Arguments of the registered ops, as their schemas order them."""

import torch

DEFAULTS = {
    "scale": 0.25,
    "support": "all",
    "head_reduce": "mean",
    "k": 4,
    "capacity": 20,
    "first": -1,
    "align": "right",
    "rule": "chord",
    "min_keep": 1,
    "clip_quantile": 0.995,
    "sensitivity": 1.0,
    "mass": 0.9,
    "sink": "merge",
    "visual_rows": "prefix",
    "renormalize": False,
    "mode": "mean",
}


def positional(op: str, given: dict) -> tuple:
    """What torch.ops.vtp_kernels.<op> takes: the arguments given, DEFAULTS, and None for others."""
    schema = getattr(torch.ops.vtp_kernels, op).default._schema
    return tuple({**DEFAULTS, **given}.get(argument.name) for argument in schema.arguments)
