"""LVPruning (arXiv 2501.13652): trained deciders beside a frozen model.

`LVPruning` prunes with them, `train` makes them. Training needs transformers, and is imported on
first use.
"""

from typing import Any

from .data import Conversation, LlavaConversations
from .method import LVPruning
from .recipe import Recipe

__all__ = ["Conversation", "LVPruning", "LlavaConversations", "Recipe", "train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training import train

    return train
