"""InflectionPruning on the pocket LLaVA: settings of one split of questions, figures of another.

    python benchmarks/pocket_llava/inflection.py --json out/inflection.json --picture out/it.png

On the "calibration" split rules and both stages are tried. Two settings are taken: the
best of those that leave at most 22 % of the visual tokens, mean over layers, and the thriftiest of
those that lose at most a point of exact match. On the "test" split they stand beside the dense
model, each rule alone, FastV and random pruning at as many tokens, VisiPruner, and a choice that no
method can make: by the truth about where the objects are.
"""

import argparse
import itertools
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels import plot
from vtp_kernels.chat import chat_inputs
from vtp_kernels.demo import load
from vtp_kernels.machine import describe
from vtp_kernels.methods import FastV, InflectionPruning, Method, RandomPruning, method_from_spec
from vtp_kernels.models import prune
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate, table
from vtp_kernels.pocket_llava.model import TRAINED
from vtp_kernels.pocket_llava.results import Results, label

POINT, SHARE = 0.01, 0.22
# Stage 1 alone, by source and rule. Similarities may be negative: a share of their sum says little.
RULES = [
    InflectionPruning(source, rule, llm_layers=())
    for source, rules in (
        ("attention", ("chord", "kneedle", "iqr", "mass")),
        ("similarity", ("chord", "kneedle", "iqr")),
    )
    for rule in rules
]
# What is calibrated: stage 1 alone, and both stages by rule and by what stage 2 leaves.
GRID = [
    *RULES[:4],
    *(
        InflectionPruning(
            "attention",
            rule,
            min_keep=min_keep,
            llm_layers=(2,),
            visual_keep=visual,
            text_keep=text,
            score_without_rope=without_rope,
        )
        for rule, min_keep, visual, text, without_rope in (
            ("chord", 64, 0.5, 1.0, True),
            ("iqr", 48, 0.5, 1.0, True),
            ("iqr", 48, 0.5, 1.0, False),
            ("iqr", 48, 0.5, 0.75, True),
            ("kneedle", 32, 0.75, 1.0, True),
            ("kneedle", 24, 0.75, 1.0, True),
        )
    ),
]
VISIPRUNER = (
    "visipruner:stages=middle,shallow_layers=0,fusion_threshold=0.9999,token_threshold=0.027,"
    "min_keep=28"
)


def best_within(rows: list[dict], share: float) -> int:
    """The row with most right answers of those that leave at most that share of the tokens."""
    good = [i for i, row in enumerate(rows) if row["visual_tokens_share"] <= share]
    return max(good, key=lambda i: (rows[i]["exact_match"], -rows[i]["visual_tokens_share"]))


def thriftiest(rows: list[dict], dense: dict, loss: float) -> int:
    """The row with fewest tokens of those that lose at most so much; else that losing least."""
    good = [i for i, row in enumerate(rows) if row["exact_match"] >= dense["exact_match"] - loss]
    if good:
        return min(good, key=lambda i: rows[i]["visual_tokens_share"])
    return max(range(len(rows)), key=lambda i: rows[i]["exact_match"])


def rivals(share: float, depth: int) -> list[Method]:
    """FastV and random pruning that leave that share of the tokens, mean over layers."""
    keep = max((share * depth - 1) / (depth - 1), 0.0)  # FastV: all of them in layer 0
    return [FastV(1, round(keep, 3)), RandomPruning(0, round(share, 3))]


@dataclass(frozen=True)
class Objects(Method):
    """Keeps the patches that show some of an object, and others by chance, `keep` in all. It is
    told where objects are, picture by picture, in the order of the questions."""

    split: str
    keep: int
    asked: list[int] = field(default_factory=lambda: [0])

    def decision_layers(self, depth):
        return (0,)

    def decide(self, layer, rows):
        scores = torch.zeros(rows.visual.shape)
        for b in range(len(scores)):
            coverage = scenes.scene(self.split, self.asked[0]).coverage.max(0)
            chance = torch.rand(coverage.size, generator=torch.Generator().manual_seed(b))
            scores[b, rows.visual[b]] = torch.from_numpy(coverage > 0).flatten() + chance
            self.asked[0] += 1
        return rows.keep_visual([self.keep] * len(scores), scores)

    def to_dict(self):
        return {"method": "objects", "keep": self.keep}


# --- picture ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch(InflectionPruning):
    """Notes the curve of each picture and its knee."""

    seen: list = field(default_factory=list)

    def decide(self, layer, rows):
        if layer == 0:
            self.seen.append(rows.vision.inflection(self.source, **self.knee))
        return super().decide(layer, rows)


def draw(model, processor, index: int, chosen: InflectionPruning, rows: list[dict], path: Path):
    """Curves and knees of one picture by both sources, and what stays; the answers of all rows."""
    case = next(itertools.islice(scenes.cases("test", index + 1), index, None))
    picture = Image.fromarray(case.scene.image)
    inputs = chat_inputs(processor, [picture], [case.question.text]).to(model.device)
    lines = []
    for source in ("attention", "similarity"):
        panels = [(f"{source}: {case.question.text}", picture)]
        for rule in ("chord", "kneedle", "iqr", "mass"):
            watch = Watch(source, rule, llm_layers=())
            with torch.inference_mode(), prune(model, watch) as run:
                model(**inputs, logits_to_keep=1)
            kept = plot.tokens(picture, run.report().kept, title=rule)
            panels += [(rule, plot.curve(watch.seen[0])), (rule, kept)]
        lines.append(plot.panels(panels[:1] + panels[1::2]))
        lines.append(plot.panels(panels[:1] + [(r, last_panel(p)) for r, p in panels[2::2]]))
    with torch.inference_mode(), prune(model, chosen) as run:
        model(**inputs, logits_to_keep=1)
    lines.append(plot.tokens(picture, run.report().kept, title="both stages"))
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.stack([chart(rows), *lines], path)


def last_panel(drawn: Image.Image) -> Image.Image:
    side = plot.PANEL
    return drawn.crop((drawn.width - side, plot.CAPTION, drawn.width, plot.CAPTION + side))


def chart(rows: list[dict], size: tuple[int, int] = (1144, 420)) -> Image.Image:
    """Exact match against the share of tokens: a numbered point a row, and their names beside."""
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = 50, 560, 14, size[1] - 40
    floor = min(row["exact_match"] for row in rows) // 0.1 / 10

    def place(share: float, match: float) -> tuple[float, float]:
        height = (match - floor) / max(1.0 - floor, 0.1)
        return left + share * (right - left), bottom - height * (bottom - top)

    for tenth in range(11):
        x, _ = place(tenth / 10, 1.0)
        pen.line((x, top, x, bottom), fill="gainsboro")
        pen.text((x - 10, bottom + 6), f"{10 * tenth} %", fill="black")
    for tenth in range(round(10 * floor), 11):
        _, y = place(0, tenth / 10)
        pen.line((left, y, right, y), fill="gainsboro")
        pen.text((8, y - 6), f"{10 * tenth} %", fill="black")
    pen.text((left, bottom + 22), "exact match, by visual tokens (mean over layers)", fill="black")
    for number, row in enumerate(rows, 1):
        x, y = place(row["visual_tokens_share"], row["exact_match"])
        color = _color(row["method"])
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        pen.text((x + 5, y - 12 if number % 2 else y + 1), str(number), fill=color)
        name = row["method"].replace(",", ", ").removesuffix(", llm_layers=")
        lines = textwrap.wrap(f"{number}. {name}", 92, subsequent_indent="    ")
        pen.text((right + 20, top + 26 * (number - 1)), "\n".join(lines), fill=color)
    return sheet


def _color(method: str) -> str:
    colors = {
        "inflection": "crimson",
        "fastv": "blue",
        "random": "gray",
        "objects": "green",
    }
    return colors.get(method.partition(":")[0], "black")


# --- all of it ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=int, default=400, help="questions to calibrate on")
    parser.add_argument("--questions", type=int, default=2000, help="questions to report")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--example", type=int, default=1, help="which question is drawn")
    parser.add_argument("--visipruner", default=VISIPRUNER, help="its setting to compare with")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    model, processor = load(TRAINED, device="cpu", dtype="float32")

    results = Results(args.json)

    def ask(method: Method | None, split: str, count: int, name: str | None = None) -> dict:
        name = name or ("none" if method is None else label(method))
        return results.row(
            (name, split, count),
            lambda: evaluate(model, processor, method, count, args.batch, split, name),
        )

    def test(method: Method | None, name: str | None = None) -> dict:
        return ask(method, "test", args.questions, name)

    dense = ask(None, "calibration", args.calibration)
    tried = [ask(method, "calibration", args.calibration) for method in GRID]
    chosen = GRID[best_within(tried, SHARE)]
    ours = dict.fromkeys((chosen, GRID[thriftiest(tried, dense, POINT)]))  # may be the same
    rows = [test(method) for method in (None, *ours)]
    share = rows[1]["visual_tokens_share"]
    rows += [test(method) for method in rivals(share, model.config.text_config.num_hidden_layers)]
    keep = round(share * scenes.GRID**2)
    rows.append(test(Objects("test", keep), f"objects:{keep}"))
    rows.append(test(method_from_spec(args.visipruner), args.visipruner))
    rows += [test(method) for method in RULES if method not in ours]
    print(table(rows))
    draw(model, processor, args.example, chosen, rows, args.picture)
    results.write({"calibration": [dense, *tried], "rows": rows, **describe()})


if __name__ == "__main__":
    main()
