"""The small LLaVA in vLLM with a KV cache that is too small for all: `make bench-vllm`.

Four engines answer the same questions in turn, all requests of a turn at once: vLLM alone, with a
budget before the language model, with tokens that leave between its layers, and with both. They
have as much memory for keys and values each, so little that vLLM alone has to preempt requests;
answers go on for as many tokens as `--answer` says. Nothing is remembered between turns.

All of it is by model runner V2. On a CPU its Triton kernels are interpreted, in every step and
however few rows it has: requests per second and times to the first token are then far from what
compiled kernels take. Stages come out slower than vLLM alone, for some of these kernels run for
each KV cache group of each step, and stages have more groups. What is counted depends neither on
that nor on the machine: blocks, preemptions and answers.

A block holds 32 tokens in as many layers as its group has: 8 in vLLM alone, fewer with stages. So
blocks are counted by the layer: one that holds them in 8 layers counts 8.
"""

if __name__ == "__main__":
    import benchmarks.vllm_v2  # noqa: F401

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import write
from benchmarks.serving import AT_ONCE, BLOCK, asked, new_engine, share_equal, vllm_version
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.vllm.stages.settings import REQUESTS, SCHEDULER

LAYERS = 8
#: In blocks of a layer: of vLLM alone, 8 requests with their whole answers.
CACHE = 8 * LAYERS * 11
METHOD = "fastv:2:0.25"
WAYS = {
    "vLLM alone": (None, None),
    "budget of 64": (64, None),
    f"stages, {METHOD}": (None, METHOD),
    f"budget of 128, {METHOD}": (128, METHOD),
}


@dataclass(frozen=True)
class Row:
    """keep: the budget of an image. method: between layers. first_token: seconds, median over
    requests. blocks: of one layer, of a request alone. most_blocks: of all at once. preempted: in
    a turn, mean. exact_match: share."""

    name: str
    keep: int | None
    method: str | None
    requests_per_second: float
    times_faster: float
    first_token: float
    blocks: int
    most_blocks: int
    groups: int
    preempted: float
    exact_match: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20, help="in a turn")
    parser.add_argument("--answer", type=int, default=40, help="tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = list(scenes.cases("test", args.turns * args.requests))
    served = {name: _Served(*how, args.answer) for name, how in WAYS.items()}
    alone = {name: engine.answers(cases[:1])["most"] for name, engine in served.items()}
    for engine in served.values():
        engine.answers(cases[:4])  # whatever happens once
    turns = []
    for first in range(0, len(cases), args.requests):
        batch = cases[first : first + args.requests]
        turns.append({name: engine.answers(batch) for name, engine in served.items()})
    rows = [_row(name, served[name], alone[name], turns, cases) for name in WAYS]
    print(table(rows))
    if args.json:
        result = {"rows": [asdict(row) for row in rows], "vllm": vllm_version()}
        result |= {"block": BLOCK, "at_once": AT_ONCE, "cache": CACHE, "answer": args.answer}
        write(args.json, result | {"requests": len(cases), "interpreted": _is_interpreted()})


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Served:
    """An engine in this process, with a look at what its scheduler gives out."""

    def __init__(self, keep: int | None, method: str | None, answer: int) -> None:
        self.keep = keep
        settings: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
        layers = LAYERS
        if method is not None:
            layers = 2  # by vLLM's own grouping
            settings |= {
                "additional_config": {"vtp": {"method": method}},
                "scheduler_cls": SCHEDULER,
                "logits_processors": [REQUESTS],
            }
        blocks = CACHE // layers + 1  # one is never given out
        self.llm, self.sampling = new_engine(
            answer, ignore_eos=True, num_gpu_blocks_override=blocks, **settings
        )
        self._watch(layers)

    def _watch(self, layers: int) -> None:
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        groups = scheduler.kv_cache_config.kv_cache_groups
        self.groups = len(groups)
        if any(len(group.layer_names) != layers for group in groups):
            raise RuntimeError(f"groups of {layers} layers were expected, got {groups}")
        pool = scheduler.kv_cache_manager.block_pool
        schedule, preempt = scheduler.schedule, scheduler._preempt_request
        empty = pool.get_num_free_blocks()

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            used = layers * (empty - pool.get_num_free_blocks())
            self.most = max(self.most, used)
            return output

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = watched, counted

    def answers(self, cases: list) -> dict[str, Any]:
        self.most = self.preempted = 0
        llm, first, ids = self.llm.llm_engine, {}, {}
        start = time.perf_counter()
        for number, case in enumerate(cases):
            llm.add_request(str(number), asked(case, self.keep), self.sampling)
        while llm.has_unfinished_requests():
            for output in llm.step():
                number = int(output.request_id)
                first.setdefault(number, time.perf_counter() - start)
                ids[number] = output.outputs[0].token_ids
        return {
            "seconds": time.perf_counter() - start,
            "first": list(first.values()),
            "most": self.most,
            "preempted": self.preempted,
            "texts": [self._text(ids[number]) for number in range(len(cases))],
        }

    def _text(self, ids: Any) -> str:
        """The answer: what comes before the model would have ended it."""
        tokenizer, ids = self.llm.get_tokenizer(), list(ids)
        end = tokenizer.eos_token_id
        return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).strip()


def _row(name: str, served: _Served, alone: int, turns: list, cases: list) -> Row:
    ours = [turn[name] for turn in turns]
    plain = [turn[next(iter(WAYS))] for turn in turns]
    return Row(
        name=name,
        keep=WAYS[name][0],
        method=WAYS[name][1],
        requests_per_second=statistics.median(len(t["texts"]) / t["seconds"] for t in ours),
        times_faster=statistics.median(
            dense["seconds"] / turn["seconds"] for dense, turn in zip(plain, ours, strict=True)
        ),
        first_token=statistics.median(second for turn in ours for second in turn["first"]),
        blocks=alone,
        most_blocks=max(turn["most"] for turn in ours),
        groups=served.groups,
        preempted=statistics.fmean(turn["preempted"] for turn in ours),
        exact_match=share_equal(
            [text for turn in ours for text in turn["texts"]],
            [case.question.answer for case in cases],
        ),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | requests/s | times faster | first token, s | blocks of a request | blocks in use at "
        "most | groups | preempted in a turn | exact match |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.requests_per_second:.2f} | {row.times_faster:.2f} "
            f"| {row.first_token:.1f} | {row.blocks} | {row.most_blocks} | {row.groups} "
            f"| {row.preempted:.0f} | {100 * row.exact_match:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
