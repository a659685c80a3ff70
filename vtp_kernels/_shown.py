"""How a value that does not fit is told of in an error message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["shown"]

LONGEST = 80  # characters of a value
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

COLLECTIONS = (list, tuple, set, frozenset, dict)


def shown(x: Any) -> str:
    """`x` itself where that is short and plain, else what kind of thing it is.

    The repr of a tensor waits for its device, and that of a model is pages long.
    """
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
    if isinstance(x, type):
        return f"the class {x.__qualname__}"
    text = _plain(x)
    if text is None:
        return f"a {type(x).__qualname__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _plain(x: Any, depth: int = 3) -> str | None:
    """The repr of a plain value, or of a small collection of such; None for all else."""
    if type(x) in PLAIN:
        # Of a long string a piece will do.
        return repr(x[:LONGEST] if isinstance(x, str | bytes) else x)
    if type(x) not in COLLECTIONS or len(x) > LONGEST or depth == 0:
        return None
    items = [item for pair in x.items() for item in pair] if isinstance(x, dict) else x
    return None if any(_plain(item, depth - 1) is None for item in items) else repr(x)
