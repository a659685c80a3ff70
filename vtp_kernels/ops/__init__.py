"""The public ops: one file each, with the contract, the fake kernel and the choice of backend."""

from ._checks import debug
from .assign_rows import assign_rows
from .attention_scores import attention_scores
from .attention_topk import attention_topk
from .cls_inflection import cls_inflection
from .compact_kv import compact_kv
from .compact_rows import compact_rows
from .inflection import inflection
from .merge_rows import merge_rows
from .passive_attention import passive_attention
from .select_diverse import select_diverse
from .select_topk import select_topk
from .token_contribution import token_contribution

__all__ = [
    "assign_rows",
    "attention_scores",
    "attention_topk",
    "cls_inflection",
    "compact_kv",
    "compact_rows",
    "debug",
    "inflection",
    "merge_rows",
    "passive_attention",
    "select_diverse",
    "select_topk",
    "token_contribution",
]
