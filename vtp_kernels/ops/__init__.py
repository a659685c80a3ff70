"""The public ops: one file each, with the contract, the fake kernel and the choice of backend."""

from vtp_kernels.ops._checks import debug
from vtp_kernels.ops.attention_scores import attention_scores
from vtp_kernels.ops.attention_topk import attention_topk
from vtp_kernels.ops.cls_inflection import cls_inflection
from vtp_kernels.ops.compact_kv import compact_kv
from vtp_kernels.ops.compact_rows import compact_rows
from vtp_kernels.ops.inflection import inflection
from vtp_kernels.ops.passive_attention import passive_attention
from vtp_kernels.ops.select_topk import select_topk
from vtp_kernels.ops.token_contribution import token_contribution

__all__ = [
    "attention_scores",
    "attention_topk",
    "cls_inflection",
    "compact_kv",
    "compact_rows",
    "debug",
    "inflection",
    "passive_attention",
    "select_topk",
    "token_contribution",
]
