"""Draws the committed pictures from the committed result files: `python -m benchmarks.pictures`.

What a picture shows of a model is computed anew, by the small LLaVA, in some seconds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import chart
from benchmarks.harness import Timing
from benchmarks.readme import FILES, RESULTS, compared
from vtp_kernels import demo, plot
from vtp_kernels.pocket_llava import inflection, leaderboard, visipruner
from vtp_kernels.pocket_llava.model import TRAINED


def _rows(name: str) -> list[dict]:
    return json.loads((RESULTS / FILES[name] / name).read_text())["rows"]


def kept(path: Path) -> None:
    """What the demo writes."""
    demo.pocket(repeats=1, picture=path)


def layers(path: Path) -> None:
    counts = {row["method"]: row["visual_tokens_per_layer"] for row in _rows("demo.json")}
    plot.layers(counts, path)


def tradeoff(path: Path) -> None:
    points = {
        name: (row["prefill_flops_reduction"], row["exact_match"])
        for name, row in compared().items()
    }
    plot.tradeoff(points, path)


def ops(path: Path) -> None:
    chart.draw([Timing(**row) for row in _rows("bench.json")], path)


def of_all_methods(path: Path) -> None:
    board = json.loads((RESULTS / FILES["leaderboard.json"] / "leaderboard.json").read_text())
    leaderboard.draw(board["board"], path)


def of_visipruner(path: Path) -> None:
    model, processor = demo.load(TRAINED, device="cpu", dtype="float32")
    visipruner.draw(model, processor, visipruner.named(_rows("visipruner.json")[1]), path)


def of_inflection(path: Path) -> None:
    model, processor = demo.load(TRAINED, device="cpu", dtype="float32")
    inflection.draw(model, processor, _rows("inflection.json"), path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "intel-xeon-2-cores/bench.png": ops,
    "intel-xeon-2-cores/kept.png": kept,
    "intel-xeon-2-cores/layers.png": layers,
    "intel-xeon-2-cores/tradeoff.png": tradeoff,
    "intel-xeon-2-cores/visipruner.png": of_visipruner,
    "amd-epyc-2-cores/inflection.png": of_inflection,
    "amd-epyc-2-cores/leaderboard.png": of_all_methods,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(PICTURES)}")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder (default: in place)")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        path = args.into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PICTURES[name](path)
        print(path)


if __name__ == "__main__":
    main()
