"""VisiPruner on the pocket LLaVA: thresholds from one split of questions, figures from another.

    python benchmarks/pocket_llava/visipruner.py --json out/visipruner.json --picture out/it.png

The published thresholds are those of a model of 32 layers. Here some are tried on the "calibration"
split, and two are taken: of those that lose no more than a point of exact match, the one that saves
most; and of those that save what the paper does, the one that loses least. On the "test" split they
stand beside the dense model, and methods that save as many FLOPs as the first of them.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels import plot
from vtp_kernels.accounting import Course, account
from vtp_kernels.chat import chat_inputs
from vtp_kernels.demo import load
from vtp_kernels.machine import describe
from vtp_kernels.methods import FastV, Method, PyramidDrop, RandomPruning, VisiPruner
from vtp_kernels.methods.visipruner import STAGES
from vtp_kernels.models import prune
from vtp_kernels.plot.looks import fitted
from vtp_kernels.plot.sheet import Block, Cell
from vtp_kernels.plot.sheet import draw as draw_blocks
from vtp_kernels.plot.tokens import panels
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate, table
from vtp_kernels.pocket_llava.model import TRAINED
from vtp_kernels.pocket_llava.results import Results, label

POINT = 0.01
# The paper's 53.9 %, and what may be lost of it from one split to the other.
SAVING = 0.539 + 0.015
GRID = [
    VisiPruner(("middle",), 0, 0.9999, threshold, min_keep=min_keep)
    for threshold, min_keep in ((0.013, 40), (0.018, 40), (0.022, 40), (0.027, 40), (0.027, 28))
]
# What the other two stages cost: the exit, and a passive layer 0.
GRID += [
    VisiPruner(("middle", "deep"), 0, 0.9999, 0.018, min_keep=40),
    VisiPruner(STAGES, 1, 0.9995, 0.02),
]
SIDE = 200  # pixels, of a panel of the picture
RIVALS: tuple[Callable[[float], Method], ...] = (
    lambda keep: FastV(1, keep),
    lambda keep: FastV(2, keep),
    lambda keep: PyramidDrop((2, 4, 6), (keep, keep / 2, keep / 4)),
    lambda keep: RandomPruning(0, keep),
)


def best(rows: list[dict], dense: dict) -> int:
    """The row that saves most at no more than a point lost; if all lose more, that losing least."""
    good = [i for i, row in enumerate(rows) if row["exact_match"] >= dense["exact_match"] - POINT]
    if good:
        return max(good, key=lambda i: rows[i]["prefill_flops_reduction"])
    return max(range(len(rows)), key=lambda i: rows[i]["exact_match"])


def thrifty(rows: list[dict]) -> int:
    """The row that loses least of those that save what the paper does; else that saving most."""
    good = [i for i, row in enumerate(rows) if row["prefill_flops_reduction"] >= SAVING]
    if good:
        return max(good, key=lambda i: rows[i]["exact_match"])
    return max(range(len(rows)), key=lambda i: rows[i]["prefill_flops_reduction"])


def as_thrifty(make: Callable[[float], Method], config, text: int, saved: float) -> Method:
    """The method of its kind that saves that share of the FLOPs, with the share of tokens to keep
    rounded to 0.005."""

    def saves(method: Method | None) -> float:
        visual = scenes.GRID**2
        return account(config, method, text=text, before=0, visual=visual, course=Course()).flops

    dense = saves(None)
    keeps = [step / 200 for step in range(1, 201)]
    return make(min(keeps, key=lambda keep: abs(1 - saves(make(keep)) / dense - saved)))


# --- picture ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch(Method):
    """Removes nothing, and notes every layer's contributions."""

    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def decision_layers(self, depth):
        return range(1, depth)

    def observed_layers(self, depth):
        return range(depth - 1)

    def decide(self, layer, rows):
        self.seen[layer - 1] = tuple(x[rows.visual].cpu() for x in rows.token_contribution())

    def to_dict(self):
        return {"method": "watch"}


def draw(model, processor, method: VisiPruner, path: Path, index: int = 1) -> None:
    """Layer by layer: how long the contribution of each token is, were none removed, the smallest
    cosine; and below, who stays."""
    case = next(itertools.islice(scenes.cases("test", index + 1), index, None))
    picture = Image.fromarray(case.scene.image)
    inputs = chat_inputs(processor, [picture], [case.question.text]).to(model.device)
    watch = Watch()
    for what in (watch, method):
        with torch.inference_mode(), prune(model, what) as run:
            model(**inputs, logits_to_keep=1)
    cells = [Cell(case.question.text, fitted(picture, SIDE))]
    for layer, (cosine, norm) in watch.seen.items():
        shades = (norm / norm.max().clamp(min=1e-9)).sqrt().view(scenes.GRID, scenes.GRID)
        shown = Image.fromarray((255 * shades).to(torch.uint8).numpy()).convert("RGB")
        words = f"layer {layer}, from {float(cosine.min()):.4f}"
        cells.append(Cell(words, fitted(shown, SIDE, Image.NEAREST)))
    head = "how much each token contributes, layer by layer, and the smallest cosine"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [cells[:4], cells[4:]]
    look, kept = panels(picture, run.report(), SIDE)
    below = Block([[look, *kept]], SIDE, [f"{plot.readable([label(method)])[0]} keeps"])
    draw_blocks([Block(rows, SIDE, [head]), below], path)


def named(row: dict) -> VisiPruner:
    """The method of a row of the result file."""
    (method,) = (method for method in GRID if label(method) == row["method"])
    return method


# --- all of it ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=int, default=2000, help="questions to calibrate on")
    parser.add_argument("--questions", type=int, default=2000, help="questions to report")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--example", type=int, default=1, help="which question is drawn")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    model, processor = load(TRAINED, device="cpu", dtype="float32")
    results = Results(args.json)

    def ask(method: Method | None, split: str, count: int) -> dict:
        name = "none" if method is None else label(method)
        return results.row(
            (name, split, count),
            lambda: evaluate(model, processor, method, count, args.batch, split, name),
        )

    dense = ask(None, "calibration", args.calibration)
    tried = [ask(method, "calibration", args.calibration) for method in GRID]
    chosen = dict.fromkeys((best(tried, dense), thrifty(tried)))  # may be the same
    case = next(scenes.cases("test", 1))
    inputs = chat_inputs(processor, [Image.fromarray(case.scene.image)], [case.question.text])
    text = inputs["input_ids"].shape[1] - scenes.GRID**2
    methods = [None, *(GRID[i] for i in chosen)]
    rows = [ask(method, "test", args.questions) for method in methods]
    saved = rows[1]["prefill_flops_reduction"]
    config = model.config.text_config
    rows += [ask(as_thrifty(make, config, text, saved), "test", args.questions) for make in RIVALS]
    print(table(rows))
    draw(model, processor, methods[1], args.picture, args.example)
    results.write({"calibration": [dense, *tried], "rows": rows, **describe()})


if __name__ == "__main__":
    main()
