"""Every method on the pocket LLaVA, at as many visual tokens.

    python benchmarks/pocket_llava/leaderboard.py --json out/leaderboard.json --plot out/it.png

Each is to leave 22, 11 and 5.5 % of the visual tokens, mean over layers. Of the settings that do,
those are taken that answer most of the "calibration" split; the table is of the "test" split. A
method that first decides behind layer K leaves at least K / L of the tokens of a model with L
layers, so some cannot go that low in this small one: the table says so. Choosing by chance is there
with five seeds. Times are of one prompt, in turns with the dense model, and last: they want a
machine that does nothing else.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels import methods as m
from vtp_kernels import plot
from vtp_kernels.chat import chat_inputs
from vtp_kernels.demo import load, pruned
from vtp_kernels.machine import describe
from vtp_kernels.methods import Method
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate
from vtp_kernels.pocket_llava.model import DECIDERS, TRAINED
from vtp_kernels.pocket_llava.results import Results, label

SHARES = (0.22, 0.11, 0.055)
TOKENS = scenes.GRID**2
NEAR = 0.004  # how far off a share may be, of all tokens
SEEDS = range(5)

Left = Callable[[Method], float]
"""The share of the visual tokens that a method leaves, mean over layers, of one prompt."""


def tokens(share: float) -> int:
    return round(share * TOKENS)


def near(make: Callable[[float], Method], share: float, left: Left) -> list[Method]:
    """The method of its kind that leaves that share; none if it cannot go that low."""
    low, high = 0, 1000  # thousandths to keep, of which few leave less than many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(make(middle / 1000)) <= share else (low, middle)
    best = min((make(keep / 1000) for keep in (low, high)), key=lambda x: abs(left(x) - share))
    return [best] if abs(left(best) - share) <= NEAR else []


@dataclass(frozen=True)
class Entry:
    """A method of the board, and what is tried of it to leave a share of the tokens."""

    name: str
    settings: Callable[[float, Left], list[Method]]
    why: str = ""
    """What to know of it here."""


def _before(kind: type[Method], **grid: tuple) -> Callable[[float, Left], list[Method]]:
    """Settings of a method that acts before layer 0."""

    def settings(share: float, left: Left) -> list[Method]:
        values = itertools.product(*grid.values())
        return [kind(keep=tokens(share), **dict(zip(grid, one, strict=True))) for one in values]

    return settings


def _within(*makers: Callable[[float], Method]) -> Callable[[float, Left], list[Method]]:
    """Settings of a method that acts between layers."""
    return lambda share, left: [x for make in makers for x in near(make, share, left)]


def _inflection(share: float, left: Left) -> list[Method]:
    n = tokens(share)
    return [
        m.InflectionPruning(source, min_keep=n, max_keep=n, llm_layers=())
        for source in ("attention", "similarity")
    ]


def _steps(kind: type[Method], layers: tuple[int, ...], ratio: float) -> Callable[[float], Method]:
    """A method in steps, each of which leaves that much of what the one before left."""
    return lambda keep: kind(layers, tuple(round(keep * ratio**i, 4) for i in range(len(layers))))


def _both(kind: type[Method]) -> list[Callable[[float], Method]]:
    return [_steps(kind, (1, 3, 5), 0.5), _steps(kind, (1, 2, 4), 0.35)]


def _lvpruning(keep: float) -> Method:
    return m.LVPruning(DECIDERS / "seed-1", (1, 2, 4), (keep, 0.6 * keep, 0.15 * keep))


BEHIND = "decides between layers, of which there are but eight"
BOARD = (
    Entry("InflectionPruning", _inflection, "stage 1 alone, a fixed number of tokens"),
    Entry("VisionZip", _before(m.VisionZip, contextual=(0.08, 0.156, 0.3))),
    Entry("VisPruner", _before(m.VisPruner, important=(0.3, 0.5, 0.8))),
    Entry("HiPrune", _before(m.HiPrune, around=(0.1, 0.3), middle=(0.375, 0.6))),
    Entry("DivPrune", _before(m.DivPrune)),
    Entry("CDPruner", _before(m.CDPruner), "relevance by the language model's embeddings"),
    Entry("FastV", _within(lambda keep: m.FastV(1, keep), lambda keep: m.FastV(2, keep)), BEHIND),
    Entry("PyramidDrop", _within(*_both(m.PyramidDrop)), BEHIND),
    Entry("SparseVLM", _within(*_both(m.SparseVLM)), BEHIND),
    Entry("DART", _within(lambda keep: m.DART(1, keep)), BEHIND),
    Entry("LVPruning", _within(_lvpruning), "deciders trained for other shares; " + BEHIND),
    Entry(
        "VisiPruner",
        _within(
            lambda keep: m.Schedule({1: keep}, score="contribution"),
            lambda keep: m.Schedule({2: keep}, score="contribution"),
        ),
        "its middle stage at a fixed number of tokens; " + BEHIND,
    ),
)


# --- what is measured -----------------------------------------------------------------------------


def answers(
    entries: list[Entry], ask: Callable[[Method | None, str], dict], left: Left
) -> Iterator[dict]:
    """The rows of the board: dense, chance, and every method at every share."""
    yield {"name": "no pruning", "share": 1.0, **ask(None, "test")}
    for share in SHARES:
        seeds = [ask(m.RandomPruning(0, tokens(share), seed), "test") for seed in SEEDS]
        yield {
            "name": "chance",
            "share": share,
            "settings": m.RandomPruning(0, tokens(share)).to_dict(),
            **seeds[0],
            "exact_match": statistics.fmean(row["exact_match"] for row in seeds),
            "exact_match_of_seeds": [row["exact_match"] for row in seeds],
        }
    for entry in entries:
        for share in SHARES:
            tried = entry.settings(share, left)
            if not tried:
                yield {"name": entry.name, "share": share, "cannot": True}
                continue
            found = [ask(method, "calibration") for method in tried]
            best = max(range(len(tried)), key=lambda i: found[i]["exact_match"])
            row = ask(tried[best], "test")
            if abs(row["visual_tokens_share"] - share) > NEAR:
                raise RuntimeError(f"{row['method']} leaves {row['visual_tokens_share']:.3f}")
            made = tried[best].to_dict()
            yield {"name": entry.name, "share": share, "settings": made, **row}


@torch.no_grad()
def times(model, inputs, method: Method | None, turns: int) -> dict[str, float]:
    """Time to the first token as a ratio to the dense model's of the same turn, and milliseconds
    that the method took to decide: medians."""
    ratios, choosing = [], []
    for turn in range(turns + 1):
        dense, _ = _prefill(model, inputs, None)
        ours, chose = _prefill(model, inputs, method)
        if turn:  # the first one warms up
            ratios.append(ours / dense)
            choosing.append(1e3 * chose)
    return {
        "time_to_first_token": statistics.median(ratios),
        "choosing_ms": statistics.median(choosing),
    }


def _prefill(model, inputs, method: Method | None) -> tuple[float, float]:
    """Seconds of a prefill, and of these what deciding took."""
    spent = 0.0

    def timed(decide):
        def decision(*args):
            nonlocal spent
            start = time.perf_counter()
            try:
                return decide(*args)
            finally:
                spent += time.perf_counter() - start

        return decision

    kind = type(method)
    held = mock.patch.object(kind, "decide", timed(kind.decide)) if method else nullcontext()
    with pruned(model, method), held:
        start = time.perf_counter()
        model(**inputs, logits_to_keep=1)
        return time.perf_counter() - start, spent


def table(rows: list[dict]) -> str:
    """Markdown: a line a method, right answers at each share, at the first what it takes, and what
    to know of it."""
    shares = [f"{100 * share:g} % of tokens" for share in SHARES]
    head = ["method", *shares, "FLOPs saved", "first token, time", "choosing, ms", "here"]
    lines = [head, ["---"] * len(head)]
    notes = {entry.name: entry.why for entry in BOARD}
    for name in dict.fromkeys(row["name"] for row in rows):
        of_it = {row["share"]: row for row in rows if row["name"] == name}
        first = next((row for row in of_it.values() if not row.get("cannot")), None)
        if first is None:
            lines.append([name, *["cannot"] * len(SHARES), "", "", "", notes[name]])
            continue
        cells = [_right(of_it.get(share, of_it.get(1.0))) for share in SHARES]
        saved = f"{100 * first['prefill_flops_reduction']:.0f} %"
        took = first.get("time_to_first_token"), first.get("choosing_ms")
        told = [f"{took[0]:.2f}" if took[0] else "", f"{took[1]:.1f}" if took[1] else ""]
        lines.append([name, *cells, saved, *told, notes.get(name, "")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _right(row: dict) -> str:
    if row.get("cannot"):
        return "cannot"
    seeds = row.get("exact_match_of_seeds")
    spread = f" ({100 * min(seeds):.1f} to {100 * max(seeds):.1f})" if seeds else ""
    return f"{100 * row['exact_match']:.1f}{spread}"


def draw(rows: list[dict], path: Path) -> None:
    """Right answers against FLOPs saved, a line a method; not of the dense model, which saves
    nothing, and would leave no room for the others."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["share"] < 1 and not row.get("cannot"):
            point = row["prefill_flops_reduction"], row["exact_match"]
            lines.setdefault(row["name"], []).append(point)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.tradeoff(lines, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=int, default=500, help="questions to choose by")
    parser.add_argument("--questions", type=int, default=2000, help="questions to report")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--turns", type=int, default=15, help="timed prefills; 0: no times")
    parser.add_argument("--only", nargs="+", choices=[x.name for x in BOARD], help="methods")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    entries = [entry for entry in BOARD if args.only is None or entry.name in args.only]
    counts = {"calibration": args.calibration, "test": args.questions}
    model, processor = load(TRAINED, device="cpu", dtype="float32")
    results = Results(args.json)

    def ask(method: Method | None, split: str) -> dict:
        name = "none" if method is None else label(method)
        return results.row(
            (name, split, counts[split]),
            lambda: evaluate(model, processor, method, counts[split], args.batch, split, name),
        )

    case = next(scenes.cases("test", 1))
    inputs = chat_inputs(processor, [Image.fromarray(case.scene.image)], [case.question.text])

    @functools.cache
    def left_of(told: str) -> float:
        method = Method.from_dict(json.loads(told))
        with torch.no_grad(), pruned(model, method) as run:
            model(**inputs, logits_to_keep=1)
        return statistics.fmean(n for (n,) in run.report().visual_tokens_per_layer) / TOKENS

    def left(method: Method) -> float:
        return left_of(json.dumps(method.to_dict()))  # some methods hold what has no hash

    board = list(answers(entries, ask, left))
    for row in board if args.turns else ():
        if "settings" in row:
            row |= times(model, inputs, Method.from_dict(row["settings"]), args.turns)
    print(table(board))
    draw(board, args.plot)
    asked = [row for row in results.known.values() if row["split"] == "calibration"]
    tests = [row for row in results.known.values() if row["split"] == "test"]
    results.write({"board": board, "calibration": asked, "rows": tests, **describe()})


if __name__ == "__main__":
    main()
