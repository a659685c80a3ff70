"""LVPruning on the pocket LLaVA: deciders trained from some seeds, and held-out questions.

    python benchmarks/pocket_llava/lvpruning.py --train --seeds 0 1 2 --out out/deciders
    python benchmarks/pocket_llava/lvpruning.py --json out/lvpruning.json

Training takes questions of the "train" split; figures are those of the "test" split. Rivals keep as
many tokens: random ones and those that the last prompt token attends to, in the same layers, and
FastV with as many in the mean over layers.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels.demo import load
from vtp_kernels.machine import describe
from vtp_kernels.methods import FastV, LVPruning, Method, PyramidDrop, Schedule
from vtp_kernels.methods.lvpruning import Recipe, train
from vtp_kernels.methods.lvpruning.files import DESCRIPTION, load_deciders, read_fit, save_deciders
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate, table
from vtp_kernels.pocket_llava.model import DECIDERS, TRAINED
from vtp_kernels.pocket_llava.questions import PocketQuestions
from vtp_kernels.pocket_llava.results import Results

QUESTIONS = 3200
# A quarter of the model's depth where the paper has a quarter of its own, and so on. A decider as
# wide as the model would cost more than one of its layers; this one costs a tenth of that.
RECIPE = Recipe(
    layers=(1, 2, 4),
    width=64,
    batch=16,
    micro_batch=16,
    learning_rate=1.5e-3,
    ratio_weight=24.0,
    final_noise=0.0,
    precision="fp32",
    save_every=50,
)
RATIOS = ((0.6, 0.4, 0.1), (0.5, 0.3, 0.1), (0.45, 0.25, 0.05))
VISUAL = scenes.GRID**2


def train_all(model, processor, seeds: list[int], out: Path) -> None:
    """A folder per seed in `out`, which keeps the checkpoints; in float16 in DECIDERS."""
    data = PocketQuestions("train", QUESTIONS)
    for seed in seeds:
        run = out / f"seed-{seed}"
        train(model, data, processor=processor, out=run, recipe=replace(RECIPE, seed=seed))
        noted = json.loads((run / DESCRIPTION).read_text())["training"]
        shipped = DECIDERS / run.name
        save_deciders(shipped, load_deciders(run), read_fit(run), noted, torch.float16)


def rivals(ratios: tuple[float, ...]) -> dict[str, Method]:
    """By label: methods that keep as many tokens as LVPruning with these ratios."""
    ours = LVPruning(None, RECIPE.layers, ratios)
    counts = {layer: ours.budget(layer, VISUAL) for layer in RECIPE.layers}
    per_layer = [
        min([VISUAL, *(count for layer, count in counts.items() if layer <= index)])
        for index in range(8)
    ]
    mean = statistics.fmean(per_layer) / VISUAL
    written = ",".join(map(str, ratios))
    found = {
        f"random, {written}": Schedule(counts, score="random"),
        f"last token, {written}": PyramidDrop(tuple(counts), tuple(counts.values())),
    }
    keep = (8 * mean - 2) / 6  # two layers run with all of them
    if keep > 0:
        found[f"fastv:2:{keep:.3f}"] = FastV(2, round(keep, 3))
    return found


def joined(rows: list[dict], label: str) -> dict:
    """The mean of several trainings, and the least and the most that one of them gets right."""
    right = [row["exact_match"] for row in rows]
    spread = f"{label} ({len(rows)} trainings: {100 * min(right):.1f} to {100 * max(right):.1f})"
    kinds = {
        kind: statistics.fmean(row["exact_match_by_kind"][kind] for row in rows)
        for kind in rows[0]["exact_match_by_kind"]
    }
    means = {
        name: statistics.fmean(row[name] for row in rows)
        for name in ("exact_match", "visual_tokens_share", "prefill_flops_reduction")
    }
    return rows[0] | means | {"method": spread, "exact_match_by_kind": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train deciders, and stop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --train")
    parser.add_argument("--out", type=Path, default=Path("out/deciders"), help="of --train")
    parser.add_argument("--questions", type=int, default=2000, help="questions to report")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    if args.train == (args.json is not None):
        parser.error("expected either --train or --json")
    model, processor = load(TRAINED, device="cpu", dtype="float32")
    if args.train:
        train_all(model, processor, args.seeds, args.out)
        return

    results = Results(args.json, ("asked",))

    def ask(method: Method | None, label: str) -> dict:
        return results.row(
            (label, "test", args.questions),
            lambda: evaluate(model, processor, method, args.questions, args.batch, "test", label),
        )

    folders = sorted(path for path in DECIDERS.iterdir() if path.is_dir())
    rows = [ask(None, "none")]
    for ratios in RATIOS:
        written = ",".join(map(str, ratios))
        others = [ask(method, label) for label, method in rivals(ratios).items()]
        ours = [
            ask(LVPruning(folder, RECIPE.layers, ratios), f"lvpruning:{folder.name}:{written}")
            for folder in folders
        ]
        rows += [joined(ours, f"lvpruning, {written}"), *others]
    print(table(rows))
    results.write({"rows": rows, "asked": list(results.known.values()), **describe()})


if __name__ == "__main__":
    main()
