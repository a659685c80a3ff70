"""Prompts with pictures, and what a vision tower might have seen of these, for oracles."""

import numpy as np
import torch
from prompt_rows import Told, prompt_rows

import vtp_kernels as vtp
from near_ties import apart
from vtp_kernels.contract.vision import Ask, PromptVision, Seen, Shown

CHANNELS = 6


class Pictures:
    """`prompts` are lists of ("text", rows) and ("picture", height, width) in tokens; with
    `newlines` a row that shows none ends each line. What was seen is drawn: `asks`, and features;
    `rows` are the rows of the prompts. With `ties` numbers are -1, 0 and 1: of vectors of three,
    cosines that are equal by the formula are so to the bit."""

    def __init__(self, prompts, rng, asks=(), newlines=False, ties=False, **more):
        sizes = [part[1:] for parts in prompts for part in parts if part[0] == "picture"]
        width = max(h * w for h, w in sizes)
        told, shows = [], []
        for parts in prompts:
            told.append([])
            for kind, *numbers in parts:
                lines = numbers[0] * (numbers[1] + newlines) if kind == "picture" else numbers[0]
                told[-1].append((kind, lines))
        for index, (h, w) in enumerate(sizes):
            order = np.pad(
                index * width + np.arange(h * w).reshape(h, w),
                ((0, 0), (0, int(newlines))),
                constant_values=-1,
            )
            shows.append(torch.from_numpy(order.flatten()))

        def draw(*shape):
            x = rng.standard_normal(shape).astype(np.float32)
            return np.round(x).clip(-1, 1) if ties else x

        here = torch.arange(width) < torch.tensor([h * w for h, w in sizes])[:, None]
        values = {}
        for ask in asks:
            ask = ask if isinstance(ask, Ask) else Ask(ask)
            vectors = (3,) if ask.what == "keys" else ()
            values[ask] = torch.from_numpy(draw(len(sizes), width, *vectors))
        features = torch.from_numpy(draw(len(sizes), width, 4))
        seen = Seen(features, features.mean(1), values, torch.cat(shows), sizes, here)
        units = Told(told)
        counts = units.visual.sum(1).tolist()
        vision = PromptVision([Shown(seen, units.visual, counts)], None)
        self.rows = prompt_rows(told, draw, CHANNELS, **{"vision": vision} | more)
        self.seen, self.sizes, self.width, self.told = seen, sizes, width, told

    def token(self, prompt, column):
        """(picture, token) that a row shows, or None."""
        shows = int(self.rows.vision.shows[prompt, column])
        return None if shows < 0 else divmod(shows, self.width)

    def value(self, ask, prompt, column):
        """Of the token that a row shows, in float64; None where it shows none."""
        at = self.token(prompt, column)
        values = self.seen.features if ask == "features" else self.seen.values[ask]
        return None if at is None else values[at].double().numpy()

    def groups(self, per):
        """(prompt, its visual rows) of each group of the batch."""
        for b, (visual, unit) in enumerate(zip(self.rows.visual, self.rows.unit, strict=True)):
            numbers = [None] if per == "prompt" else range(len(self.rows.units[b]))
            for number in numbers:
                here = visual if number is None else unit == number
                yield b, here.nonzero()[:, 0].tolist()

    def let_rows_leave(self, kept, **more):
        """As at the entry of a later layer."""
        before, hidden = self.rows, self.rows.hidden if kept.hidden is None else kept.hidden
        hidden, visual, origin = vtp.compact_rows(
            (hidden, before.visual, before.origin), *kept.selection, align="right"
        )
        width, counts = hidden.shape[1], kept.selection.counts
        given = dict(hidden=hidden, visual=visual, origin=origin)
        given["valid"] = torch.arange(width) >= width - counts[:, None]
        given |= {"text_now": kept.text, "visual_now": kept.visual, "memory": before.memory}
        self.rows = prompt_rows(self.told, lambda *_: np.zeros((1, 1)), 1, **given | more)


def by_rank(columns, scores):
    """The highest score first; of equals the first; what has none last."""
    return sorted(columns, key=lambda c: (scores[c] is None, -(scores[c] or 0.0), c))


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0


def nearest(targets, vector, vectors):
    """Of `targets` that whose vector is most alike; of equals the first."""
    return by_rank(targets, apart({t: cosine(vector, vectors[t]) for t in targets}))[0]


def check_kept(pictures, kept, expected):
    """Which visual rows stay: `expected`, (prompt, columns) of each group."""
    chosen = torch.zeros_like(pictures.rows.visual)
    for b, columns in expected:
        chosen[b, columns] = True
    rows = pictures.rows
    for b in range(len(chosen)):
        indices = kept.selection.indices[b, : int(kept.selection.counts[b])]
        stays = torch.zeros_like(chosen[b])
        stays[indices] = True
        assert torch.equal(stays & rows.visual[b], chosen[b]), b
        assert torch.equal(stays & ~rows.visual[b], rows.text[b])
        assert kept.visual[b] == int(chosen[b].sum())


#: Prompts with pictures of several sizes, one of them without any.
PROMPTS = (
    [("text", 2), ("picture", 4, 5), ("text", 3)],
    [("text", 1), ("picture", 3, 6), ("text", 1), ("picture", 5, 2), ("text", 2)],
    [("text", 6)],
    [("picture", 1, 4), ("text", 4)],
)
