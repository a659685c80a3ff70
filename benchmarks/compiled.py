"""The decoder stack as it is and compiled, dense and pruned: time to first token.

    python -m benchmarks.compiled --json out/compiled.json
    python -m benchmarks.compiled --model llava-1.5-7b --batch 1   # as CUDA graphs

`pocket` is the small trained LLaVA of this repository, `16x1024` a LLaVA of 16 layers of that width
with one picture of 576 tokens, `llava-1.5-7b` one of that configuration; the last two have random
weights. The dense stack is compiled by `torch.compile(..., fullgraph=True)` for the very length of
the prompt, the pruned one by `Handle.compile`. All four take turns, vision tower included; ratios
are medians over the turns, with the lowest and highest beside them. Graph breaks and compilations
are those of the decoder stack.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import vtp_kernels as vtp
from benchmarks import harness
from benchmarks.end_to_end import Clock, pocket_prompts, random_model, random_prompts
from benchmarks.engine_overhead import model_of
from vtp_kernels.demo import load
from vtp_kernels.pocket_llava.model import TRAINED

MODELS = ("pocket", "16x1024", "llava-1.5-7b")
DENSE = "dense"


@dataclass
class Row:
    """`speedup` is over the dense model as it is."""

    model: str
    batch: int
    method: str
    compiled: bool
    first_token_ms: float
    speedup: float
    spread: tuple[float, float]
    graph_breaks: int
    compilations: int


def prompts(name: str, device: str, dtype: torch.dtype, tiny: bool) -> tuple[nn.Module, Callable]:
    """A model, and what makes prompts for it of a batch."""
    if name == "pocket":
        model, processor = load(TRAINED, device=device)
        return model, lambda batch: pocket_prompts(model, processor, batch)
    if name == "16x1024":
        model = model_of(*(128, 4) if tiny else (1024, 16), device, dtype)
    else:
        model = random_model(name, device, dtype, tiny)
    return model, lambda batch: random_prompts(model, batch)


def shared(model: nn.Module) -> nn.Module:
    """Another model of the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in weights})


def compile_dense(model: nn.Module, inputs: dict, mode: str | None) -> None:
    text = model.model.language_model
    text.forward = torch.compile(text.forward, fullgraph=True, dynamic=False, mode=mode)
    for _ in range(3):
        first_token(model, inputs)


@torch.no_grad()
def first_token(model: nn.Module, inputs: dict) -> float:
    clock = Clock(model.device)
    if clock.cuda:
        torch.cuda.synchronize()
    start = clock.now()
    model(**inputs, logits_to_keep=1, use_cache=True).logits.argmax(-1)
    return clock.between(start, clock.now())


def counted(work: Callable) -> tuple[int, int]:
    """Runs `work`; graph breaks and compilations in it."""
    from torch._dynamo.utils import counters

    counters.clear()
    work()
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def measure(
    name: str, model: nn.Module, inputs: dict, method: vtp.Method, turns: int, mode: str | None
) -> list[Row]:
    batch, rows = inputs["input_ids"].shape
    pruned = type(method).__name__
    models = {(way, done): shared(model) for way in (DENSE, pruned) for done in (False, True)}
    # Before anything is compiled: a method that comes or goes has all code made anew.
    runs = [vtp.apply(models[pruned, done], method) for done in (False, True)]
    made = {(way, False): (0, 0) for way in (DENSE, pruned)}
    made[DENSE, True] = counted(lambda: compile_dense(models[DENSE, True], inputs, mode))
    made[pruned, True] = counted(lambda: runs[1].compile((rows,), inputs, mode=mode))
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in models}
    for number in tqdm(range(turns + 1), desc=f"{name}, batch {batch}", disable=None):
        for key, one in models.items():
            taken = first_token(one, inputs)
            if number:  # the first turn warms up
                seconds[key].append(taken)
    assert "why_not" not in runs[1].report().compiled
    for run in runs:
        run.remove()
    return [row(name, batch, key, seconds, made[key]) for key in models]


def row(name: str, batch: int, key: tuple[str, bool], seconds: dict, made: tuple[int, int]) -> Row:
    plain, ours = seconds[DENSE, False], seconds[key]
    ratios = [a / b for a, b in zip(plain, ours, strict=True)]
    return Row(
        model=name,
        batch=batch,
        method=key[0],
        compiled=key[1],
        first_token_ms=1e3 * statistics.median(ours),
        speedup=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        graph_breaks=made[0],
        compilations=made[1],
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| model | batch | | first token | times faster | graph breaks | compilations |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for x in rows:
        low, high = x.spread
        way = f"{x.method}, compiled" if x.compiled else x.method
        made = f"{x.graph_breaks} | {x.compilations}" if x.compiled else " | "
        lines.append(
            f"| {x.model} | {x.batch} | {way} | {x.first_token_ms:,.1f} ms "
            f"| {x.speedup:.2f} [{low:.2f}, {high:.2f}] | {made} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    default = ["llava-1.5-7b"] if cuda else ["pocket", "16x1024"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=default)
    parser.add_argument("--batch", nargs="+", type=int, default=[1] if cuda else [1, 8])
    parser.add_argument("--method", type=vtp.method, default=vtp.FastV(2, 0.5))
    parser.add_argument("--mode", default="reduce-overhead" if cuda else None)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tiny", action="store_true", help="random models, narrow: a rehearsal")
    parser.add_argument("--json", type=Path, help="write the rows, machine and versions here")
    args = parser.parse_args()
    if args.turns < 3:
        parser.error("--turns: expected at least 3")
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    rows = []
    for name in args.model:
        model, make = prompts(name, args.device, dtype, args.tiny)
        for batch in args.batch:
            rows += measure(name, model, make(batch), args.method, args.turns, args.mode)
    print(table(rows))
    if args.json:
        harness.write(args.json, {"mode": args.mode, "rows": [asdict(x) for x in rows]})


if __name__ == "__main__":
    main()
