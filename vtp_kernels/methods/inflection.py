"""CLS-inflection pruning (arXiv 2409.01162): up to the knee of a picture's curve, then by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from vtp_kernels._shown import shown
from vtp_kernels.contract import vision
from vtp_kernels.contract.checks import check_depth
from vtp_kernels.contract.counts import Counts, less
from vtp_kernels.contract.method import Method, parse_settings, read_value
from vtp_kernels.flop_counts.text import head_dim
from vtp_kernels.ops.inflection import check_rule

from .budget import as_tuple, check_keep, check_layer, visual_budget
from .scorers import text as attention_from_text

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows
    from vtp_kernels.contract.vision import PromptVision

__all__ = ["InflectionPruning"]

SOURCES = (*vision.SOURCES, None)
NONE = 1 << 30
"""As many rows as no prompt has."""
RULE = ("rule", "min_keep", "max_keep", "clip_quantile", "sensitivity", "mass")


@dataclass(frozen=True)
class InflectionPruning(Method, key="inflection"):
    """Two stages, training-free. The paper's rule, layers and ratios are not public, and there is
    no code: what follows is our reading of it.

    Stage 1, before layer 0. The paper says that the similarity of visual tokens to CLS has a long
    tail, and that the head ends where the sorted curve bends. So each picture (each crop, where a
    model cuts it up, and each frame of a video) has a curve of its own and keeps what comes up to
    its knee, by `vtp_kernels.cls_inflection` or `inflection`. The rows leave behind the projector,
    whose output is that of the dense model. Rows that show no token (`image_newline`) have no score
    and stay: they are few, and tell where a line of the picture ends.

    Stage 2, before each of `llm_layers`. The paper says that visual and text tokens with a low
    cross-modal correlation leave, layer by layer. Of a visual token we take that to be the
    attention that the text behind the first picture pays it in the layer before (as
    `Schedule(score="text")`); of a text token the attention that the visual tokens pay it, and the
    last prompt token, half each, by a softmax over the text that may leave. Visual tokens stand
    before the text that asks about them and could not see it, so they score without the causal
    mask. The last prompt token, drafts of assisted decoding and each prompt's first text token
    (BOS) never leave, nor does what stands between the frames of a video (timestamps), nor any text
    of a prompt without a picture.

    Every prompt of a batch decides for itself. On a model whose tower has no CLS token the mean of
    all its tokens stands in for it, and the attention that all of them pay. That is a makeshift:
    the mean is like the background, and in the small LLaVA of this repository, were its CLS token
    left out, the tokens least like the mean would be those that matter.

    Parameters
    ----------
    source : "similarity" | "attention" | None
        What stage 1 sorts: cosine similarity to CLS, of what the feature layer of the tower puts
        out; or the attention that CLS pays in that layer, mean over heads, computed for its row
        alone. None: no stage 1.
    rule : "chord" | "kneedle" | "iqr" | "mass"
        Where a curve bends, see `vtp_kernels.inflection`. The chord is the default, for on
        long-tailed curves it keeps neither next to nothing nor nearly all.
    min_keep, max_keep : int
        Bounds of what a picture keeps in stage 1. With `max_keep` the host reads nothing: rows are
        padded to what every prompt might need, and counts stay on the device until report() asks.
        Without, it reads one number per prompt and kind at every decision that does not follow
        from numbers it has.
    clip_quantile, sensitivity, mass : float
        Of the rule. Clipping is for attention sinks, which bend the chord.
    llm_layers : tuple of int
        At least 1: the scores are those of the layer before. Empty: no stage 2.
    visual_keep, text_keep : "knee" | float | int
        What stays of the visual tokens that are there, and of the text that may leave: up to the
        knee of the prompt's sorted scores (`rule`, `min_keep`), a share of them, or so many.
        After `max_keep`, a knee only masks what leaves, while shares and numbers shorten the rows.
    score_without_rope : bool
        Stage 2 scores by queries and keys before their rotary embedding. With it, early layers
        prefer what is near: the bottom of the picture. Then rows of earlier turns do not compete.
    protect_template : bool
        Text before the first picture of a prompt stays. What a chat template puts behind the
        user's words cannot be told from them by looking at rows: see `template_tail`.
    template_tail : int
        Text tokens at the end of a prompt that never leave, at least the last one. Give the number
        that your template ends with (" ASSISTANT:" has five of them in LLaVA-1.5).
    """

    source: str | None = "similarity"
    rule: str = "chord"
    min_keep: int = 1
    max_keep: int | None = None
    clip_quantile: float = 0.995
    sensitivity: float = 1.0
    mass: float = 0.9
    llm_layers: tuple[int, ...] = (8, 16)
    visual_keep: str | int | float = 0.5
    text_keep: str | int | float = 0.75
    score_without_rope: bool = True
    protect_template: bool = True
    template_tail: int = 1

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(
                f"InflectionPruning.source: got {shown(self.source)}, expected one of {SOURCES}"
            )
        try:
            check_rule(**{name: getattr(self, name) for name in RULE})
        except (TypeError, ValueError) as error:
            raise type(error)(f"InflectionPruning.{error}") from error
        self._check_layers()
        for name in ("visual_keep", "text_keep"):
            keep = getattr(self, name)
            if isinstance(keep, str) and keep != "knee":
                raise ValueError(
                    f"InflectionPruning.{name}: expected 'knee', a share or a number, got "
                    f"{shown(keep)}"
                )
            if keep != "knee":
                check_keep(keep, f"InflectionPruning.{name}")
        for name in ("score_without_rope", "protect_template"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"InflectionPruning.{name}: expected a bool, got {shown(getattr(self, name))}"
                )
        tail = self.template_tail
        if isinstance(tail, bool) or not isinstance(tail, int):
            raise TypeError(f"InflectionPruning.template_tail: expected an int, got {shown(tail)}")
        if tail < 1:
            raise ValueError(f"InflectionPruning.template_tail: expected at least 1, got {tail}")

    def _check_layers(self) -> None:
        where = "InflectionPruning.llm_layers"
        layers = tuple(check_layer(layer, where) for layer in as_tuple(self.llm_layers, where))
        if layers != tuple(sorted(set(layers))):
            raise ValueError(f"{where}: expected ascending layers, got {layers}")
        if layers and layers[0] == 0:
            raise ValueError(
                f"{where}: scores are those of the layer before, and there is none before layer 0"
            )
        object.__setattr__(self, "llm_layers", layers)

    # ---- where it acts ------------------------------------------------------------------------

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return ((0,) if self.source else ()) + self.llm_layers

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.llm_layers)

    @property
    def keeps_text(self) -> bool:
        """Whether no text leaves; 1 is one row."""
        return isinstance(self.text_keep, float) and self.text_keep == 1.0

    @property
    def is_fixed(self) -> bool:
        """Whether stage 1 keeps one number of each picture's tokens, whatever their curve is."""
        return self.min_keep == self.max_keep

    def acausal_layers(self, depth: int) -> tuple[int, ...]:
        return () if self.keeps_text else self.observed_layers(depth)

    def vision_source(self) -> str | None:
        return self.source

    def visual_left(self, layer: int, pictures: Sequence[int]) -> int | None:
        counted = self.keeps_text and self.visual_keep != "knee"
        return self.visual_most(layer, pictures) if counted else None

    def visual_most(self, layer: int, pictures: Sequence[int]) -> int | None:
        """Of stage 2 alone: stage 1 goes by what the tower saw."""
        if self.source is not None:
            return None
        left = sum(pictures)
        for _ in [at for at in self.llm_layers if at <= layer]:
            left = _budget(self.visual_keep, left)
        return left

    def decides_by_data(self, depth: int) -> str | None:
        if self.source is not None and not self.is_fixed:
            return "min_keep and max_keep differ"
        return "a knee is looked for" if "knee" in (self.visual_keep, self.text_keep) else None

    def look_ahead(self, vision: PromptVision) -> None:
        if self.max_keep is not None:
            vision.at_most(self.max_keep)

    def check_model(self, depth: int) -> None:
        for layer in self.llm_layers:
            check_depth(layer, depth, "InflectionPruning.llm_layers")

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """Stage 2: queries and logits of all rows for either score, and keys before their rotation.
        What stage 1 computes is the vision tower's, which is not counted."""
        if layer == 0:
            return 0
        width, rows = config.hidden_size, text + visual
        queries = config.num_attention_heads * head_dim(config)
        scored_rows = rows if self.keeps_text else 2 * rows + 1
        macs = scored_rows * queries * (width + rows)
        if self.score_without_rope:
            macs += rows * width * config.num_key_value_heads * head_dim(config)
        return 2 * macs

    # ---- what it decides ----------------------------------------------------------------------

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        course = rows.memory.get("course")
        if course is None:
            course = rows.memory["course"] = Course(self, rows)
        return course.by_picture(rows) if layer == 0 else course.by_text(rows)

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        return memory["course"].events() if "course" in memory else []

    @property
    def knee(self) -> dict[str, Any]:
        """The options of `vtp_kernels.inflection`."""
        return {name: getattr(self, name) for name in RULE}

    @classmethod
    def from_spec(cls, arguments: str) -> InflectionPruning:
        """`FIELD=VALUE,...`, as in `inflection:source=attention,llm_layers=2+4,visual_keep=knee`"""
        return cls(**parse_settings(arguments, _FIELDS))


def _layers(text: str) -> tuple[int, ...]:
    """2+4"""
    return tuple(int(layer) for layer in text.split("+") if layer)


# How a setting is written on the command line.
_FIELDS = {field.name: read_value for field in fields(InflectionPruning)} | {"llm_layers": _layers}


class Course:
    """How many rows each prompt has from decision to decision, as far as the host can tell, and
    which text may leave at all."""

    def __init__(self, method: InflectionPruning, rows: PromptRows) -> None:
        self.method = method
        self.seen: tuple[Tensor, Tensor] | None = None  # tokens kept of each picture, their scores
        #: Rows of each prompt; no more than that, once the host no longer knows.
        self.text, self.visual = rows.text_now, list(rows.visual_now)
        self.known = True
        before = rows.text_before if method.protect_template else [0] * len(self.visual)
        last = method.template_tail + rows.drafts
        stays = [max(head, 1) + last for head in before]
        #: How much of the text may leave: none where there is no picture.
        self.free = less(
            self.text, [a if n else NONE for a, n in zip(stays, self.visual, strict=True)]
        )
        self.may_leave = self._may_leave(rows, before, last)  # bool [B, columns]
        if not method.keeps_text and rows.between_frames is not None:
            self._keep_timestamps(rows.between_frames)

    def _may_leave(self, rows: PromptRows, before: list[int], last: int) -> Tensor:
        rank = rows.text.cumsum(1)
        first = rows.moved(torch.tensor(before).clamp(min=1))[:, None]
        free = rows.text & (rank > first) & (rank <= rank[:, -1:] - last)
        free &= rows.visual.any(1, keepdim=True)
        # Rows may have left before this method began.
        return rows.in_columns(free.float(), 0.0) > 0

    def _keep_timestamps(self, between: Tensor) -> None:
        """What stands between frames stays. Of a call with videos the host reads what may leave."""
        may_leave = self.may_leave.cpu()
        more = (may_leave & between).sum(1).tolist()
        self.free = less(self.free, more)
        self.may_leave = (may_leave & ~between).to(self.may_leave.device)

    # ---- stage 1 ------------------------------------------------------------------------------

    def by_picture(self, rows: PromptRows) -> Kept | None:
        method, vision = self.method, rows.vision
        selection, scores = vision.inflection(method.source, **method.knee)
        self.seen = selection.counts, scores
        bounds = self.visual
        if method.max_keep is not None:
            most = vision.at_most(method.max_keep)
            bounds = [min(a, b) for a, b in zip(self.visual, most, strict=True)]
        stays = rows.text | rows.visual & vision.rows_showing(selection)
        return self._keep(rows, stays, self.text, bounds, known=method.is_fixed and is_compiling())

    # ---- stage 2 ------------------------------------------------------------------------------

    def by_text(self, rows: PromptRows) -> Kept | None:
        method = self.method
        rotary = not method.score_without_rope
        free = self.may_leave.gather(1, rows.origin) & rows.text
        stays = rows.text & ~free
        visual_scores = attention_from_text(rows, 0, rotary)
        stays = stays | self._best(rows, visual_scores, rows.visual, method.visual_keep)
        if not method.keeps_text:
            text_scores = self._correlation(rows, free, rotary)
            stays = stays | self._best(rows, text_scores, free, method.text_keep)
        else:
            stays = stays | free
        visual = [_budget(method.visual_keep, n) for n in self.visual]
        text = self.text
        if not method.keeps_text:
            free = _budgets(method.text_keep, self.free)
            text, self.free = less(text, less(self.free, free)), free
        known = self.known and "knee" not in (method.visual_keep, method.text_keep)
        return self._keep(rows, stays, text, visual, known)

    def _best(self, rows: PromptRows, scores: Tensor, among: Tensor, keep: Any) -> Tensor:
        if keep == "knee":
            return rows.up_to_knee(scores, among, **self.method.knee | {"max_keep": None})
        return rows.best(scores, among, keep)

    def _correlation(self, rows: PromptRows, free: Tensor, rotary: bool) -> Tensor:
        """Of text that may leave, with what the pictures show: float32 [B, S]."""
        options = {"among": free, "support": "candidates", "rotary": rotary}
        everything = slice(0, rows.visual.shape[1])
        of_visual = rows.attention_scores(
            everything, query_valid=rows.visual, causal=False, **options
        )
        of_last = rows.attention_scores(slice(rows.prompt_end, rows.prompt_end + 1), **options)
        return (of_visual + of_last) / 2

    # ---- both ---------------------------------------------------------------------------------

    def _keep(
        self, rows: PromptRows, stays: Tensor, text: Counts, visual: list[int], known: bool
    ) -> Kept | None:
        """Keep those rows: `text` and `visual` of each prompt, or no more than that if not known.

        Without max_keep what is not known is asked for; with it rows are padded instead."""
        capacity = None
        if not known and self.method.max_keep is not None:
            capacity = max(a + b for a, b in zip(text, visual, strict=True))
        kept = rows.keep_rows(stays, counts=(text, visual) if known else None, capacity=capacity)
        self.known = capacity is None
        if self.known:
            text, visual = self.text, self.visual
            self.text, self.visual = kept.text, kept.visual
            return None if visual == kept.visual and _are_same(text, kept.text) else kept
        self.text, self.visual = text, visual
        return kept

    def events(self) -> list[dict[str, Any]]:
        """What stage 1 found, picture by picture; waits for the GPU."""
        if self.seen is None:
            return []
        counts, scores = self.seen
        tokens = (~scores.isnan()).sum(1)
        kept = counts.minimum(tokens)
        event = {"layer": 0, "event": "inflection", "tokens": tokens.tolist()}
        return [event | {"kept": kept.tolist()}]


def _budget(keep: str | int | float, rows: int) -> int:
    """How many of so many rows stay; at most, by a knee."""
    return rows if keep == "knee" else visual_budget(keep, rows)


def _budgets(keep: str | int | float, rows: Counts) -> Counts:
    """The same of each prompt."""
    if not isinstance(rows, Tensor):
        return [_budget(keep, n) for n in rows]
    if keep == "knee":
        return rows
    if isinstance(keep, int):
        return rows.clamp(max=keep)
    return (rows.double() * keep + 0.5).floor().long().minimum(rows)


def _are_same(some: Counts, others: Counts) -> bool:
    if isinstance(some, Tensor) or isinstance(others, Tensor):
        return some is others
    return some == others
