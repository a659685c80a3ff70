"""The engine: where a model's visual tokens are, and how rows leave it. No method here."""

from .handle import Handle, apply, prune, supported_models
from .report import Report

__all__ = ["Handle", "Report", "apply", "prune", "supported_models"]
