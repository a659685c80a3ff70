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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels import plot
from vtp_kernels.chat import chat_inputs
from vtp_kernels.demo import load
from vtp_kernels.machine import describe
from vtp_kernels.methods import FastV, InflectionPruning, Method, RandomPruning, method_from_spec
from vtp_kernels.models import prune
from vtp_kernels.plot.looks import fitted
from vtp_kernels.plot.sheet import Block, Cell
from vtp_kernels.plot.sheet import draw as draw_blocks
from vtp_kernels.plot.tokens import panels
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.evaluate import evaluate, table
from vtp_kernels.pocket_llava.model import TRAINED
from vtp_kernels.pocket_llava.results import Results, label

POINT, SHARE = 0.01, 0.22
PANEL = 200  # pixels, of a picture as high as a curve
RULE_NAMES = ("chord", "kneedle", "iqr", "mass")
# Stage 1 alone, by source and rule. Similarities may be negative: a share of their sum says little.
RULES = [
    InflectionPruning(source, rule, llm_layers=())
    for source, rules in (
        ("attention", RULE_NAMES),
        ("similarity", RULE_NAMES[:3]),
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


def draw(model, processor, rows: list[dict], path: Path, index: int = 1) -> None:
    """The answers of all rows; curves and knees of one picture by both sources, and what stays by
    each rule alone and by the first setting."""
    case = next(itertools.islice(scenes.cases("test", index + 1), index, None))
    picture = Image.fromarray(case.scene.image)
    inputs = chat_inputs(processor, [picture], [case.question.text]).to(model.device)

    def kept(method: Method) -> list[Cell]:
        with torch.inference_mode(), prune(model, method) as run:
            model(**inputs, logits_to_keep=1)
        return panels(picture, run.report(), PANEL)[1]

    points = {row["method"]: (1 - row["visual_tokens_share"], row["exact_match"]) for row in rows}
    words = [in_words(spec) for spec in points]
    told = [
        word if words.count(word) == 1 else spec for word, spec in zip(words, points, strict=True)
    ]
    named = dict(zip(told, points.values(), strict=True))
    answers = plot.tradeoff(named, saved="visual tokens gone, mean over layers")
    blocks = [Block([[Cell("", answers)]], answers.width)]
    for source in ("attention", "similarity"):
        watched = [Watch(source, rule, llm_layers=()) for rule in RULE_NAMES]
        stays = [kept(watch)[-1] for watch in watched]
        curves = [Cell(watch.rule, plot.curve(watch.seen[0])) for watch in watched]
        head = f"{source} of CLS" if source == "attention" else "similarity to CLS"
        heads = [f"{head}, sorted, and what stays by each rule"]
        blocks.append(Block([curves, stays], curves[0].picture.width, heads))
    chosen = method_from_spec(rows[1]["method"])
    last = [Cell(case.question.text, fitted(picture, PANEL)), *kept(chosen)]
    blocks.append(Block([last], blocks[1].side, [in_words(rows[1]["method"])]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_blocks(blocks, path)


def in_words(spec: str) -> str:
    """A row of the result file, named for a picture in which most are InflectionPruning's."""
    if spec.startswith("objects:"):
        return "told where the objects are"
    if not spec.startswith(InflectionPruning.name):
        return plot.readable([spec])[0]
    method = method_from_spec(spec)
    if not method.llm_layers:
        return f"{method.source}, {method.rule}"
    return f"both stages, {method.rule}, at least {method.min_keep}"


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
    draw(model, processor, rows, args.picture, args.example)
    results.write({"calibration": [dense, *tried], "rows": rows, **describe()})


if __name__ == "__main__":
    main()
