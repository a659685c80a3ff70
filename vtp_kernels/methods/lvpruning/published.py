"""FLOPs as the paper counts them (LVPruning, arXiv 2501.13652, section 4).

The paper does not spell its recipe out; this one, found by trying, gives its figures.

One picture and 30 tokens of text through LLaVA-1.5: the matrix products of all linear layers, 2 per
multiply-accumulate; attention itself is left out.

    vision tower   24 layers x 577 rows, its patch embedding not among them
    projector      2 layers x 576 rows
    language       32 layers, each with the rows that are left there
    logits         the output embedding, for every row that is left in the end
    deciders       each for the visual rows it looks at, and the text

That gives 8.38 TFLOPs dense, 3.97, 3.18 and 2.79 for ratios that begin with 0.6, 0.5 and 0.45, cut
off behind the second digit as in the paper, and 0.71 for three deciders that all look at all 576.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from vtp_kernels.flops import Attention, flops

from .deciders import Shape
from .method import kept_tokens
from .recipe import LAYERS, check_stages

__all__ = ["PAPER_RATIOS", "TEXT", "Published", "published_flops", "published_table"]

TEXT = 30
PAPER_RATIOS = ((0.6, 0.4, 0.2), (0.5, 0.3, 0.1), (0.45, 0.25, 0.05))


@dataclass(frozen=True)
class Published:
    """FLOPs of one prompt with one picture."""

    tower: int
    projector: int
    language: int
    logits: int
    deciders: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def published_flops(
    config: Any,
    ratios: tuple[float, ...] | None,
    *,
    layers: tuple[int, ...] = LAYERS,
    text: int = TEXT,
    width: int | None = None,
) -> Published:
    """Of a LLaVA with these ratios, by the paper's recipe. None: dense, without deciders.

    `config` is a transformers LlavaConfig with a CLIP tower; `width` that of the deciders, by
    default the model's.
    """
    if ratios is not None:
        check_stages(layers, ratios, "published_flops")
    vision, language = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    counts = [patches] * language.num_hidden_layers
    shape = Shape(language.hidden_size, width or language.hidden_size, layers)
    deciders = 0
    for layer, ratio in zip(layers, ratios or (), strict=ratios is not None):
        deciders += 2 * shape.linear_macs(text, counts[layer])
        counts[layer:] = [kept_tokens(ratio, patches)] * (len(counts) - layer)
    rows = [text + count for count in counts]
    tower_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    projector = vision.hidden_size * language.hidden_size + language.hidden_size**2
    return Published(
        tower=2 * (patches + 1) * vision.num_hidden_layers * tower_layer,
        projector=2 * patches * projector,
        language=flops(language, rows, attention={i: Attention(n, 0) for i, n in enumerate(rows)}),
        logits=2 * rows[-1] * language.hidden_size * language.vocab_size,
        deciders=deciders,
    )


def published_table(config: Any, ratios: tuple[tuple[float, ...], ...] = PAPER_RATIOS) -> str:
    """The dense model and each of the ratios, TFLOPs."""
    dense = published_flops(config, None)
    heads = ("ratios", "TFLOPs", "less", "tower", "projector", "language", "logits", "deciders")
    lines = [f"{heads[0]:<18}" + "".join(f"{head:>10}" for head in heads[1:])]
    for given in (None, *ratios):
        count = published_flops(config, given)
        label = "dense" if given is None else ", ".join(f"{ratio:g}" for ratio in given)
        parts = "".join(f"{part / 1e12:>10.3f}" for part in astuple(count))
        less = 1 - count.total / dense.total
        lines.append(f"{label:<18}{count.total / 1e12:>10.3f}{less:>10.1%}{parts}")
    return "\n".join(lines)
