"""The cells that carry goals, in bfloat16: what each op is to reach on an H200, in a CUDA graph.

In the order in which they are worth knowing, for where time is short. `tiny` cells are as many, of
the same kinds, for a rehearsal on a CPU.
"""

from dataclasses import replace

import torch

from benchmarks import (
    assign_rows,
    attention_scores,
    attention_topk,
    cls_inflection,
    compact_kv,
    compact_rows,
    inflection,
    merge_rows,
    passive_attention,
    select_diverse,
    select_topk,
    token_contribution,
)
from benchmarks.harness import Case, Goal
from benchmarks.shapes import Shape, of_model

LLAVA, NEXT = of_model("LLaVA-1.5-7B"), of_model("LLaVA-NeXT-7B")
LONG = Shape("10,000 tokens, 28 heads on 4", 1, 9900, 100, 28, 4, 128, torch.bfloat16)
LONG_MHA = replace(LONG, name="10,000 tokens, 32 heads", heads=32, kv_heads=32)


def microseconds(case: Case, most: float) -> Case:
    return replace(case, goal=Goal(microseconds=most))


def share_of_copy(case: Case, least: float) -> Case:
    return replace(case, goal=Goal(share_of_copy=least))


def cases(device: str, tiny: bool = False) -> list[Case]:
    def of(shape: Shape, batch: int = 1) -> Shape:
        if not tiny:
            return replace(shape, batch=batch)
        heads, kv_heads = (4, 4) if shape.heads == shape.kv_heads else (4, 1)
        small = {"visual": shape.visual // 24, "text": 8, "heads": heads, "kv_heads": kv_heads}
        return replace(shape, batch=min(batch, 2), dim=32, **small)

    def tokens(count: int) -> int:
        return count // 24 if tiny else count

    def select(length: int, k: int) -> Case:
        return select_topk.case(1, tokens(length), max(tokens(k), 1), device)

    def diverse(rule: str) -> Case:
        width, k = (64, 4) if tiny else (4096, 64)
        return select_diverse.case(1, tokens(576), width, k, rule, torch.bfloat16, device)

    rows = 4 if tiny else 100
    return [
        microseconds(select(576, 64), 4),
        microseconds(select(2880, 320), 4),
        microseconds(select(10_000, 1000), 6),
        microseconds(attention_topk.case(of(LLAVA), device), 8),
        microseconds(attention_topk.case(of(NEXT), device), 8),
        microseconds(token_contribution.case(of(LLAVA), device), 10),
        share_of_copy(compact_kv.case(of(LLAVA), 10, device, layers=2 if tiny else 32), 0.85),
        microseconds(cls_inflection.case(1, tokens(576), torch.bfloat16, device), 8),
        share_of_copy(attention_scores.case(of(LLAVA, batch=32), 1, device), 0.8),
        microseconds(attention_topk.case(of(LONG), device, rows), 25),
        microseconds(attention_topk.case(of(LONG_MHA), device, rows), 25),
        share_of_copy(token_contribution.case(of(LLAVA, batch=32), device), 0.8),
        share_of_copy(compact_rows.case(of(NEXT, batch=8), 2, device), 0.8),
        attention_scores.case(of(LLAVA), rows, device),
        *(diverse(rule) for rule in ("maxmin", "dpp")),
        passive_attention.case(of(LLAVA), device),
        passive_attention.case(of(NEXT), device),
        inflection.case(1, tokens(10_000), device),
        inflection.case(1, tokens(576), device),
        assign_rows.case(1, tokens(576), max(tokens(30), 1), 1024, torch.bfloat16, device),
        merge_rows.case(1, tokens(576), max(tokens(30), 1), 4096, torch.bfloat16, device),
    ]
