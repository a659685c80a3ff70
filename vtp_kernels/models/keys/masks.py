"""Attention masks for layers whose keys are not those the model made its own mask for.

The model makes one mask, sized on layer 0. Layers that hold fewer keys need their own, in the form
that the model's attention implementation takes: transformers' mask interface knows those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    flash_attention_mask,
)

__all__ = [
    "causal_mask",
    "columns_of",
    "mask_of",
    "padding_of",
    "right_aligned",
    "takes_keys_by_mask",
    "tells_by_mask",
    "valid_keys",
    "without_padding",
]


def takes_keys_by_mask(config: Any) -> bool:
    """Whether a model's attention reads the keys that its mask has a column for, not all there are.

    So does FlashAttention. With a static cache it needs a mask in any case, to leave out unused
    slots, but transformers (5.23) makes none where there is no padding.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation) is flash_attention_mask


def tells_by_mask(config: Any) -> bool:
    """Whether a model's attention is told by its mask what each row sees, not of padding alone."""
    known = config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS
    return known and not takes_keys_by_mask(config)


def causal_mask(
    config: Any,
    hidden: Tensor,
    *,
    past: int | Tensor,
    key_length: int,
    valid: Tensor | None,
    static: bool = False,
    sees: Callable[..., Any] | None = None,
) -> Any:
    """Mask for the rows `hidden` [B, Q, C] over `key_length` keys, `past` of which came before.

    `valid` is bool [B, key_length], or None where there is no padding. None comes back where the
    attention needs no mask, so that SDPA takes its flash path. The values of `valid` are not read,
    so nothing waits for the GPU (FlashAttention unpads, and waits, by itself). `static` says that
    the keys come from a preallocated cache, whose unused slots must be masked. `sees` is a mask
    function of transformers' over the indices of these rows and keys, where rows see anything else
    than all keys before them.
    """
    kind = config._attn_implementation
    if kind not in ALL_MASK_ATTENTION_FUNCTIONS:
        # transformers gives such an attention no mask at all; then padding would be attended to.
        if valid is not None or sees is not None:
            what = "which rows are padding" if sees is None else "what each row sees"
            raise NotImplementedError(
                f"the attention implementation {kind!r} has no entry in AttentionMaskInterface, so "
                f"it cannot be told {what}; register one, or use batches whose prompts keep "
                "equally many tokens, in models whose rows see all before them"
            )
        return None
    rows = hidden.shape[1]
    if kind == "sdpa" and not static and sees is None:
        if valid is None and rows in (1, key_length):
            return None  # as transformers' function finds out, too
        if rows == 1:
            return valid[:, None, None, :]
    if static and takes_keys_by_mask(config):
        seen = int(past) + rows  # read from the device; unpadding waits for it in every layer
        valid = hidden.new_ones(len(hidden), seen).bool() if valid is None else valid[:, :seen]
    empty = isinstance(past, int) and past == 0
    return ALL_MASK_ATTENTION_FUNCTIONS[kind](
        batch_size=hidden.shape[0],
        q_length=rows,
        kv_length=key_length,
        q_offset=past if sees is None else 0,
        kv_offset=0,
        mask_function=causal_mask_function if sees is None else sees,
        attention_mask=valid,
        allow_is_causal_skip=sees is None and valid is None and (empty or not static),
        dtype=hidden.dtype,
        config=config,
        use_vmap=False,
        device=hidden.device,
    )


def mask_of(arguments: dict[str, Any]) -> Any:
    """A call's attention mask. generate() may give one for each kind of layer: then that of those
    whose rows see all before them, which tells best what is padding."""
    mask = arguments.get("attention_mask")
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask


def columns_of(attention_mask: Any, rows: int, past: int | None) -> Tensor | None:
    """What a call's mask says of all rows that the model was given: bool [B, past + rows], or None
    if there is no mask. `past` is None where the host does not know it, as with a static cache.

    A mask [B, 1, Q, K], as generate() makes it for static caches, says so in its last row.
    """
    if attention_mask is None:
        return None
    shape = _shape_of(attention_mask)
    if len(shape) == 4:
        if past is not None and rows > 1:
            raise NotImplementedError(
                "attention_mask: a 4D mask cannot be carried over to fewer rows; pass the 2D "
                "padding mask [B, S]"
            )
        return _open(attention_mask[:, 0, -1])
    if past is not None and shape[1] != past + rows:
        raise ValueError(
            f"attention_mask: expected [B, {past + rows}], a column for each of the {past} rows "
            f"given before and the {rows} of this call, got {list(shape)}"
        )
    return attention_mask.ne(0)


def without_padding(config: Any, mask: Tensor | None, own: Any) -> bool:
    """Whether `mask` bool [B, C], that of the call, leaves nothing out; False where nobody looked.
    `own` is what the model made of it for its layers: none, with some kinds of attention, where it
    looked and found no padding."""
    if mask is None:
        return True
    if config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        return own is None
    return bool(mask.all())  # the model makes no mask for these, whatever it says


def padding_of(attention_mask: Any, columns: Tensor | None, rows: int, past: int) -> Tensor | None:
    """Which of a call's `rows` new rows are real: bool [B, rows], or None if no mask was given.

    `attention_mask` is the model's argument, and `columns` what it says of all rows: of a 2D mask
    the last ones are these. In the 4D mask that generate() makes for static caches, a real row at
    least sees itself.
    """
    if columns is None:
        return None
    if attention_mask.dim() == 2:
        return columns if columns.shape[1] == rows else columns[:, -rows:]
    return _open(attention_mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)[:, :rows])


def _shape_of(attention_mask: Any) -> torch.Size:
    if isinstance(attention_mask, Tensor) and attention_mask.dim() in (2, 4):
        return attention_mask.shape
    shape = getattr(attention_mask, "shape", None)
    raise NotImplementedError(
        "attention_mask: expected a tensor [B, S] or [B, 1, Q, S], which tells what is padding, "
        f"got {type(attention_mask).__name__} {shape if shape is None else tuple(shape)}; pass the "
        "2D padding mask [B, S]"
    )


def _open(part: Tensor) -> Tensor:
    """Of a mask that holds bools, or what is added to the logits: where it lets attention pass."""
    return part.ne(0) if part.dtype == torch.bool else part == 0


def right_aligned(totals: list[int] | None, counts: Tensor, width: int) -> Tensor | None:
    """Which of `width` rows are real where each prompt has its own at the end: bool [B, width], or
    None if all are. `counts` [B] are the numbers of rows, on the device, and `totals` the same if
    the host knows them."""
    if totals is not None and min(totals) == width:
        return None
    slots = torch.arange(width, device=counts.device)
    return slots >= width - counts[:, None]


def valid_keys(
    past: int, past_valid: Tensor | None, valid: Tensor | None, rows: Tensor
) -> Tensor | None:
    """Which keys are real, of `past` earlier ones and of the rows after them: bool [B, past + S].

    `past_valid` bool [B, past] and `valid` bool [B, S] say so of each, None that all are; so does
    None as the result. `rows` is any bool [B, S].
    """
    if past == 0 or (past_valid is None and valid is None):
        return valid
    now = torch.ones_like(rows) if valid is None else valid
    before = now.new_ones(len(now), past) if past_valid is None else past_valid
    return torch.cat((before, now), dim=1)
