"""`llava_hf_vtp` where a task gives lmms-eval a text and its pictures."""

from lmms_eval.models.simple.llava_hf import LlavaHf

from .pruned import Pruned

__all__ = ["PrunedLlavaHf"]


class PrunedLlavaHf(Pruned, LlavaHf):
    """LlavaHf, pruned."""
