"""compact_rows: keep the chosen rows of hidden states, masks, positions and the like."""

import math
from collections.abc import Sequence

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake

ALIGNMENTS = ("left", "right")


def compact_rows(
    tensors: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    align: str = "left",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Gathers the chosen rows of several tensors that share batch and sequence, in one launch.

    Args:
        tensors: [B, S, ...] each, of any dtype and any trailing shape.
        indices: int64 [B, K], rows to keep, strictly ascending. What stands past the count is
            ignored.
        counts: int32 or int64 [B], how many indices of a row are real. None: all K.
        align: "left": rows first, then padding; "right": padding first. Padding is 0 (False).
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        One tensor [B, K, ...] per tensor given.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU, and on a GPU after
            `vtp_kernels.debug(True)`, also indices out of range or not ascending.
        TypeError: a dtype that is not supported.
        NotImplementedError: inputs that require grad, a backend that cannot serve.
    """
    tensors = tuple(tensors)
    any_ = _checks.ANY
    _checks.tensor("indices", indices, "B, K", (any_, any_), _checks.INT64)
    batch, device = indices.shape[0], indices.device
    if counts is not None:
        _checks.tensor("counts", counts, "B", (batch,), _checks.INTS, device)
    _checks.one_of("align", align, ALIGNMENTS)
    length = any_
    for i, x in enumerate(tensors):
        trailing = x.shape[2:] if isinstance(x, Tensor) else ()
        dtypes = (x.dtype,) if isinstance(x, Tensor) else ()
        _checks.tensor(f"tensors[{i}]", x, "B, S, ...", (batch, length, *trailing), dtypes, device)
        if math.prod(x.shape[2:]) > _checks.MAX_SIZE:
            raise ValueError(
                f"tensors[{i}] must have at most {_checks.MAX_SIZE} elements in a row, got "
                f"{list(x.shape)}"
            )
        length = x.shape[1]
    _checks.inference_only("compact_rows", *tensors)
    if not tensors:
        return tensors
    backend = choose("compact_rows", indices, backend)
    if _checks.must_read(indices, backend):
        _checks.row_indices(indices, counts, length)
    try:
        return run(tensors, indices, counts, align=align, backend=backend)
    except RuntimeError:
        if _checks.may_read(indices):
            _checks.row_indices(indices, counts, length)
        raise


def run(
    tensors: Sequence[Tensor], indices: Tensor, counts: Tensor | None, *, align: str, backend: str
) -> tuple[Tensor, ...]:
    """`compact_rows` of arguments that are known to fit, on a backend that can serve them."""
    if backend == "reference":
        return reference.compact_rows(tensors, indices, counts, align=align)
    rows = [rowwise(x) for x in tensors]
    return tuple(kernel("compact_rows", backend)(rows, rowwise(indices), rowwise(counts), align))


@register_fake("compact_rows")
def _(tensors, indices, counts, align):
    return [x.new_empty(*indices.shape, *x.shape[2:]) for x in tensors]
