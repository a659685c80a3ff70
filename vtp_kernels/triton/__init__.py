"""The ops as Triton kernels, for GPUs that the native library has no image for.

One file an op, as in csrc/. Each has kernels, which know no torch, and a launcher with the
arguments of the native op; `library` makes the launchers `torch.ops.vtp_kernels_triton.<op>`.
Importing this package imports Triton.
"""

from .attention_scores import attention_scores
from .attention_topk import attention_topk
from .cls_inflection import cls_inflection
from .compact_kv import compact_kv, compact_kv_
from .compact_rows import compact_rows
from .inflection import inflection
from .library import probe, register
from .passive_attention import passive_attention
from .select_topk import select_topk
from .token_contribution import token_contribution

__all__ = ["probe"]

for _launcher in (
    attention_scores,
    attention_topk,
    cls_inflection,
    compact_kv,
    compact_rows,
    inflection,
    passive_attention,
    select_topk,
    token_contribution,
):
    register(_launcher)
register(compact_kv_, mutates=("keys", "values"))
