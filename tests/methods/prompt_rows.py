"""The rows of a batch of prompts as a method sees them before layer 0, without a model."""

import numpy as np
import torch

from vtp_kernels.contract.backends import Backends
from vtp_kernels.contract.rows import PromptRows
from vtp_kernels.contract.unit import Unit

BOS = ("text", 2)
ASKS = ("text", 3)


class Told:
    """The units of prompts that are lists of ("text", rows), ("picture", tokens) and ("video",
    frames, tokens of each, rows of text before each, whether a row that shows nothing ends it)."""

    videos = True

    def __init__(self, prompts):
        self.lengths = [0] * len(prompts)
        self.all, spans = [[] for _ in prompts], []
        for b, parts in enumerate(prompts):
            pictures = videos = 0
            for kind, *numbers in parts:
                if kind == "text":
                    self.lengths[b] += numbers[0]
                elif kind == "picture":
                    spans.append((b, pictures, None, None, self.take(b, numbers[0]), None))
                    pictures += 1
                else:
                    frames, tokens, text, newline = numbers
                    for frame in range(frames):
                        self.lengths[b] += text
                        more = newline and frame == frames - 1
                        columns = self.take(b, tokens + more)
                        grid = columns[:tokens]
                        spans.append((b, None, videos, range(frame, frame + 1), columns, grid))
                    videos += 1
        self.width = max(self.lengths)
        for b, picture, video, frames, columns, grid in spans:
            pad = self.width - self.lengths[b]  # prompts end together
            grid = None if grid is None else (grid + pad)[None]
            self.all[b].append(Unit(b, picture, video, frames, columns + pad, grid))

    def take(self, prompt, count):
        first = self.lengths[prompt]
        self.lengths[prompt] += count
        return torch.arange(first, first + count)

    @property
    def visual(self):
        shows = torch.zeros(len(self.all), self.width, dtype=torch.bool)
        for units in self.all:
            for unit in units:
                shows[unit.prompt, unit.columns] = True
        return shows

    def numbers(self, device):
        numbers = torch.full((len(self.all), self.width), -1)
        for units in self.all:
            for number, unit in enumerate(units):
                numbers[unit.prompt, unit.columns] = number
        return numbers

    def visual_rows(self, visual):
        return visual

    def counts(self, visual):
        return [[len(unit.columns) for unit in units] for units in self.all]


def prompt_rows(prompts, draw, channels, **more):
    """PromptRows whose `hidden` are those that draw(rows, channels) makes, as a numpy array; `more`
    of what they are made of in place of what is here."""
    units = Told(prompts)
    shape = len(prompts), units.width
    hidden = torch.from_numpy(np.stack([draw(units.width, channels) for _ in prompts]))
    places = torch.arange(units.width).expand(shape)
    valid = places >= units.width - torch.tensor(units.lengths)[:, None]
    visual = units.visual
    counts = visual.sum(1).tolist()
    given = dict(
        hidden=hidden,
        visual=visual,
        valid=valid,
        origin=places,
        prompt_visual=visual,
        visual_at_start=counts,
        visual_now=counts,
        text_now=[a - b for a, b in zip(units.lengths, counts, strict=True)],
        text_before=(valid & (visual.cumsum(1) == 0)).sum(1).tolist(),
        drafts=0,
        columns=units.width,
        depth=6,
        memory={},
        observation=None,
        past=0,
        key_valid=lambda: valid,
        sight=None,
        vision=None,
        units=units,
        backends=Backends(None),
    )
    return PromptRows(**given | more)


def kept_columns(kept, rows, prompt):
    """The visual columns of a prompt that stay, as a set; and a check that nothing else leaves."""
    indices = kept.selection.indices[prompt, : int(kept.selection.counts[prompt])].tolist()
    assert set(rows.text[prompt].nonzero()[:, 0].tolist()) <= set(indices)
    found = {at for at in indices if rows.visual[prompt, at]}
    assert kept.visual[prompt] == len(found)
    assert kept.text[prompt] == len(indices) - len(found)
    return found
