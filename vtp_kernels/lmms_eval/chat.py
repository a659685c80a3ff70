"""`llava_hf_vtp` where a task gives lmms-eval the messages of a chat."""

from lmms_eval.models.chat.llava_hf import LlavaHf

from .pruned import Pruned

__all__ = ["PrunedLlavaHf"]


class PrunedLlavaHf(Pruned, LlavaHf):
    """LlavaHf, pruned."""
