"""The ops as Triton kernels, for GPUs that the native library has no image for.

One file an op, as in csrc/. Each has kernels, which know no torch, and a launcher with the
arguments of the native op; `library` makes the launchers `torch.ops.vtp_kernels_triton.<op>`.
Importing this package imports Triton.
"""

from vtp_kernels.triton.attention_scores import attention_scores
from vtp_kernels.triton.attention_topk import attention_topk
from vtp_kernels.triton.cls_inflection import cls_inflection
from vtp_kernels.triton.compact_kv import compact_kv, compact_kv_
from vtp_kernels.triton.compact_rows import compact_rows
from vtp_kernels.triton.inflection import inflection
from vtp_kernels.triton.library import probe, register
from vtp_kernels.triton.passive_attention import passive_attention
from vtp_kernels.triton.select_topk import select_topk
from vtp_kernels.triton.token_contribution import token_contribution

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
