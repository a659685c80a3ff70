"""A picture of a benchmark's ratios: one line an op, one dot a shape, beside its best rival."""

import math
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.harness import Timing

WIDTH, LEFT, RIGHT, TOP, LINE = 900, 190, 30, 34, 30
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
INK, FAINT, FASTER, SLOWER = "#222222", "#d8d8d8", "#1f77b4", "#d62728"


def draw(timings: list[Timing], path: str | os.PathLike | None = None) -> Image.Image:
    """How many times faster than the best rival, on a logarithmic scale; slower in red."""
    by_op: dict[str, list[float]] = {}
    for timing in timings:
        by_op.setdefault(timing.op, []).append(min(timing.speedup.values()))
    ratios = [ratio for values in by_op.values() for ratio in values]
    ticks = [t for t in TICKS if t <= max(2.0, 2 * max(ratios)) or t <= 2]
    low, high = math.log(min(0.5, *ratios)), math.log(max(ticks[-1], *ratios))

    def x_of(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(ratio) - low) / (high - low)

    height = TOP + LINE * len(by_op) + 34
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    pen.text((LEFT, 8), "times faster than the best rival, every shape a dot", INK, font)
    for tick in ticks:
        x = x_of(tick)
        pen.line((x, TOP, x, height - 28), INK if tick == 1 else FAINT, 2 if tick == 1 else 1)
        pen.text((x, height - 24), f"{tick:g}", INK, font, anchor="ma")
    for i, (op, values) in enumerate(by_op.items()):
        y = TOP + LINE * i + LINE / 2
        pen.text((LEFT - 12, y), op, INK, font, anchor="rm")
        for ratio in values:
            x = x_of(ratio)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), SLOWER if ratio < 1 else FASTER)
        middle = x_of(math.exp(sum(map(math.log, values)) / len(values)))
        pen.line((middle, y - 11, middle, y + 11), INK, 3)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return picture
