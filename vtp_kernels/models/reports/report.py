"""What a pruned prefill did, and what it saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtp_kernels.contract.counts import Counts, on_host
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.contract.storage import read_json
from vtp_kernels.flop_counts.text import head_dim
from vtp_kernels.flops import Attention, Spans, layer_flops, passive_attention, visual_pairs

from ..keys.reach import Blocks, LayerKind, reach_of
from ..pictures.units import Units
from .pairs import pairs_with_visual

__all__ = ["PrefillRecord", "Report", "StageRecord"]


class KeptColumns(dict[int, Tensor]):
    """{layer: bool [B, S]}, with `visual` bool [B, S]: the input columns that are visual tokens."""

    def __init__(self, kept: dict[int, Tensor], visual: Tensor) -> None:
        super().__init__(kept)
        self.visual = visual


@dataclass(frozen=True)
class Report:
    """The last forward pass that brought images: B prompts, L decoder layers, S input columns.

    Padding is counted nowhere. "Dense" is the same call with nothing leaving.

    Attributes
    ----------
    method : dict
        As `method.to_dict()`.
    dense_tokens : [B]
        Tokens of each prompt.
    tokens_per_layer, visual_tokens_per_layer : [L][B]
        Rows entering each layer: all, and visual tokens.
    kv_tokens_per_layer : [L][B]
        Keys each layer holds after the call; more than its rows where the cache came with some,
        fewer where it lets go of those out of a sliding window, none where its attention is linear.
    kept : {layer: bool [B, S]}
        For each layer before which rows could leave: the input columns that stayed, text included;
        `kept.visual` bool [B, S] tells the visual ones. On the CPU.
    prefill_flops, dense_prefill_flops : int, or None where they are not known
        Language model, all prompts: projections, attention, MLP; 2 per multiply-accumulate.
        Attention is counted of all rows with all keys, as masks do not make it any less. What
        was spent on deciding is counted where a method runs networks of its own (LVPruning) or
        compares rows (DivPrune, CDPruner, VisPruner, DART, SparseVLM, those for videos). Every row
        counts in the last layer, too, although where few logits are asked for it runs on theirs
        alone.
    flops_reduction : float, or None
        1 - prefill_flops / dense_prefill_flops.
    flops_unknown : str or None
        Why FLOPs are not known.
    visual_attention_reduction : float
        Share of the attention weights (pairs of this call's rows, of which one sees the other;
        linear attention has none) with a visual token as query or key that are gone: not computed,
        or without weight in passive layers.
    kv_bytes, dense_kv_bytes : int
        Keys and values of all layers after the call.
    events : list of dict
        What happened at which layer, in order. Where rows that left were merged into some that
        stayed: "merged", with how many "rows" of each prompt, and "into" how many.
    units : list of dict, or None
        The pictures and frames of videos, in the order in which they stand in the prompts, and how
        many of their `tokens` stayed: `kept` {layer: int}, as above. "prompt", and in it "picture"
        or "video", count from 0; "frames" names those of the video that share the tokens, as Qwen
        merges two and two. A row whose logits are asked for stays. None where the family, or the
        call, does not tell whose the tokens are, or the model is gone.
    flops_per_layer, dense_flops_per_layer : [L], or None where they are not known
        Of `prefill_flops` and `dense_prefill_flops`, what each layer costs; the first without what
        was spent on deciding.
    scores : {layer: float32 [B, S]}
        What columns were ranked by before that layer, the higher the longer they stay; NaN where
        they were not. Layers before which nothing was ranked are missing. On the CPU.
    compiled : dict, or None without `Handle.compile`
        Whether the call ran compiled: the `length` it was padded to and by how many rows
        (`padding`), the `lengths` and the `mode` there are, how many `variants` were compiled, and
        the `bytes` of the GPU's memory these hold (None on a CPU); or `why_not`.
    """

    method: dict[str, Any]
    dense_tokens: list[int]
    tokens_per_layer: list[list[int]]
    visual_tokens_per_layer: list[list[int]]
    kv_tokens_per_layer: list[list[int]]
    kept: KeptColumns
    prefill_flops: int | None
    dense_prefill_flops: int | None
    flops_reduction: float | None
    flops_unknown: str | None
    visual_attention_reduction: float
    kv_bytes: int
    dense_kv_bytes: int
    events: list[dict[str, Any]]
    units: list[dict[str, Any]] | None = None
    flops_per_layer: list[int] | None = None
    dense_flops_per_layer: list[int] | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    compiled: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `kept` as the list of columns that stayed, per layer and prompt; scores that
        are not a number are None. `visual` are the columns of the visual tokens, and `width` is how
        many columns the input has."""
        plain = asdict(replace(self, kept={}, scores={}))  # type: ignore[arg-type]
        plain["kept"] = {str(layer): _columns(mask) for layer, mask in self.kept.items()}
        plain["visual"], plain["width"] = _columns(self.kept.visual), self.kept.visual.shape[1]
        plain["scores"] = {
            str(layer): [[None if x != x else x for x in row] for row in scores.tolist()]
            for layer, scores in self.scores.items()
        }
        for unit in plain["units"] or ():
            unit["kept"] = {str(layer): count for layer, count in unit["kept"].items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """The report that `to_dict` was called on.

        Raises ValueError if that is none, or one of an older version, without `visual`.
        """
        names = [known.name for known in fields(cls)]
        lacking = [name for name in (*names, "visual", "width") if name not in plain]
        if lacking:
            raise ValueError(f"report: expected what to_dict() gives, without {', '.join(lacking)}")
        width = plain["width"]
        kept = {int(layer): _masks(rows, width) for layer, rows in plain["kept"].items()}
        units = plain["units"] and [
            unit | {"kept": {int(layer): count for layer, count in unit["kept"].items()}}
            for unit in plain["units"]
        ]
        values = {name: plain[name] for name in names}
        columns = KeptColumns(kept, _masks(plain["visual"], width))
        scores = {int(layer): _scores(rows) for layer, rows in plain["scores"].items()}
        return cls(**values | {"kept": columns, "units": units, "scores": scores})

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON, for `python -m vtp_kernels plot`."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Report:
        """Read what `save` wrote. Raises ValueError for other files, OSError where none is."""
        plain = read_json(path)
        try:
            return cls.from_dict(plain)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: expected what report.save() wrote: {error}") from error

    def __str__(self) -> str:
        chain = self.method["method"] == "chain"
        parts = self.method["parts"] if chain else [self.method]
        lines = [" + ".join(map(_settings, parts))]
        for b in range(min(len(self.dense_tokens), 4)):
            lines += [self._prompt(b), *self._videos(b)]
        if len(self.dense_tokens) > 4:
            lines.append(f"  ... and {len(self.dense_tokens) - 4} more prompts")
        lines.append(
            f"  prefill: {self._flops()}, attention to and from visual tokens "
            f"{self.visual_attention_reduction:.1%} less"
        )
        lines.append(
            f"  KV cache: {self.dense_kv_bytes / 2**20:.1f} -> {self.kv_bytes / 2**20:.1f} MiB "
            f"({1 - self.kv_bytes / self.dense_kv_bytes:.1%} less)"
        )
        return "\n".join(lines)

    def visual_at_start(self, prompt: int) -> int:
        """Visual tokens that a prompt came with."""
        pruned = [event for event in self.events if event["event"] == "pruned"]
        before = pruned[0]["visual_before"] if pruned else self.visual_tokens_per_layer[0]
        return before[prompt]

    def _flops(self) -> str:
        if self.flops_unknown is not None:
            return f"FLOPs not known ({self.flops_unknown})"
        return (
            f"{_si(self.dense_prefill_flops)}FLOP -> {_si(self.prefill_flops)}FLOP "
            f"({self.flops_reduction:.1%} less)"
        )

    def _prompt(self, b: int) -> str:
        visual = [counts[b] for counts in self.visual_tokens_per_layer]
        text = [counts[b] - n for counts, n in zip(self.tokens_per_layer, visual, strict=True)]
        at_start = self.visual_at_start(b)
        line = f"  prompt {b}: {self.dense_tokens[b]} tokens, "
        line += f"{at_start} visual: {_course(at_start, visual)}"
        words = self.dense_tokens[b] - at_start
        return line + (f"; {words} text: {_course(words, text)}" if text[-1] != words else "")

    def _videos(self, b: int) -> list[str]:
        """A line for each video of a prompt: what its frames have left in the end."""
        frames: dict[int, list[dict[str, Any]]] = {}
        for unit in self.units or ():
            if unit["prompt"] == b and "video" in unit and unit["kept"]:
                frames.setdefault(unit["video"], []).append(unit)
        lines = []
        for video, units in frames.items():
            layer = max(units[0]["kept"])
            counts = [unit["kept"][layer] for unit in units]
            shown = units[-1]["frames"][-1] + 1
            grids = f" in {len(units)} grids" if shown != len(units) else ""
            course = f"{counts[0]} each" if len(set(counts)) == 1 else " ".join(map(str, counts))
            lines.append(
                f"    video {video + 1}: {shown} frames{grids}; kept from layer {layer}, first to "
                f"last: {course}"
            )
        return lines


def _columns(masks: Tensor) -> list[list[int]]:
    """bool [B, S] as the columns that are True, prompt by prompt."""
    return [row.nonzero()[:, 0].tolist() for row in masks]


def _masks(columns: list[list[int]], width: int) -> Tensor:
    """What `_columns` was called on."""
    masks = torch.zeros(len(columns), width, dtype=torch.bool)
    for row, of_prompt in zip(masks, columns, strict=True):
        row[of_prompt] = True
    return masks


def _scores(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in rows])


def _settings(method: dict[str, Any]) -> str:
    """As fastv layer=2 keep=0.5."""
    settings = (f"{key}={value}" for key, value in method.items() if key != "method")
    return " ".join([method["method"], *settings])


def _kept_of(units: Units, kept: dict[int, Tensor]) -> list[dict[str, Any]] | None:
    """Of every picture and frame, how many tokens stayed."""
    try:
        found = [unit for of_prompt in units.all for unit in of_prompt]
    except NotImplementedError:
        return None
    described = []
    for unit in found:
        where: dict[str, Any] = {"prompt": unit.prompt, "picture": unit.picture}
        if unit.frames is not None:
            where = {"prompt": unit.prompt, "video": unit.video, "frames": list(unit.frames)}
        stayed = {layer: int(mask[unit.prompt, unit.columns].sum()) for layer, mask in kept.items()}
        described.append(where | {"tokens": len(unit.columns), "kept": stayed})
    return described


class Ranked(NamedTuple):
    """What rows were ranked by in a decision.

    origin: int64 [B, S], the columns of the rows that were there. by: scores [B, S], and among
    which of the rows, bool [B, S]; what comes later counts."""

    origin: Tensor
    by: list[tuple[Tensor, Tensor]]


class StageRecord(NamedTuple):
    """One decision that was carried out. origin int64 [B, K] and valid bool [B, K] or None."""

    layer: int
    text: Counts
    visual: Counts
    origin: Tensor
    valid: Tensor | None
    ranked: Ranked


@dataclass(frozen=True)
class PrefillRecord:
    """What the engine notes in passing. Tensors stay on their device until someone asks."""

    config: Any
    method: Method
    depth: int
    bytes_per_number: int
    prompt_visual: Tensor
    text: list[int]
    visual: list[int]
    stages: list[StageRecord]
    past_rows: list[tuple[int, Tensor | None]]
    kinds: tuple[LayerKind, ...]
    blocks: Blocks | None
    end: int
    """The column after the last of this call."""
    letting_go: frozenset[int]
    """Layers that keep no more in the cache than their window takes."""
    passive: Mapping[int, PassiveVisual]
    linear: frozenset[int]
    """Layers with linear attention, which hold no keys."""
    forgotten: frozenset[int]
    """Layers whose cache lost all visual rows."""
    memory: dict[str, Any]
    """What the method noted."""
    units: Units
    compiled: dict[str, Any] | None = None

    def report(self) -> Report:
        kept = {stage.layer: self._kept(stage) for stage in self.stages}
        batch = len(self.text)
        text, visual = self._per_layer()
        tokens = _add(text, visual)
        dense = _add([self.text] * self.depth, [self.visual] * self.depth)
        past = self._past(batch)
        keys, dense_keys = _add(tokens, past), _add(dense, past)
        try:
            dense_layers = self._flops(dense, [self.visual] * self.depth, dense_keys, [{}] * batch)
            layers = self._flops(tokens, visual, keys, self._attention(text, visual, past))
            spent, dense_spent, unknown = sum(layers) + self._deciding(), sum(dense_layers), None
        except NotImplementedError as error:
            spent, dense_spent, layers, dense_layers = None, None, None, None
            unknown = str(error)
        held = self._held(text, visual, past)
        return Report(
            method=self.method.to_dict(),
            dense_tokens=dense[0],
            tokens_per_layer=tokens,
            visual_tokens_per_layer=visual,
            kv_tokens_per_layer=held,
            kept=KeptColumns(kept, self.prompt_visual.cpu()),
            prefill_flops=spent,
            dense_prefill_flops=dense_spent,
            flops_reduction=None if spent is None else 1 - spent / dense_spent,
            flops_unknown=unknown,
            visual_attention_reduction=1
            - self._visual_pairs(tokens, text)
            / replace(self, passive={}, stages=[])._visual_pairs(dense, [self.text] * self.depth),
            kv_bytes=self._kv_bytes(held),
            dense_kv_bytes=self._kv_bytes(replace(self, stages=[])._within_windows(dense_keys)),
            events=self._events(),
            units=_kept_of(self.units, kept),
            flops_per_layer=layers,
            dense_flops_per_layer=dense_layers,
            scores={
                stage.layer: self._scores(stage.ranked) for stage in self.stages if stage.ranked.by
            },
            compiled=self.compiled,
        )

    def _per_layer(self) -> tuple[list[list[int]], list[list[int]]]:
        text, visual = [self.text] * self.depth, [self.visual] * self.depth
        for stage in self.stages:
            left = self.depth - stage.layer
            text[stage.layer :] = [on_host(stage.text)] * left
            visual[stage.layer :] = [on_host(stage.visual)] * left
        return text, visual

    def _past(self, batch: int) -> list[list[int]]:
        """Keys each layer had before the call, [L][B]."""
        counts = [[rows] * batch for rows, _ in self.past_rows] or [[0] * batch] * self.depth
        for layer, (_, valid) in enumerate(self.past_rows):
            if valid is not None:
                counts[layer] = valid.sum(1).tolist()
        return counts

    def _held(
        self, text: list[list[int]], visual: list[list[int]], past: list[list[int]]
    ) -> list[list[int]]:
        """Keys that each layer has after the call, [L][B]."""
        held = _add(text, past)
        for layer, counts in enumerate(visual):
            passive = self.passive.get(layer)
            if layer in self.linear:
                held[layer] = [0] * len(counts)
                continue
            if layer in self.forgotten:
                continue
            if passive is not None and passive.leaves_one:
                counts = [min(count, 1) for count in counts]
            (held[layer],) = _add([held[layer]], [counts])
        return self._within_windows(held)

    def _within_windows(self, held: list[list[int]]) -> list[list[int]]:
        """Keys that each layer has, [L][B], without those that it lets go of."""
        held = list(held)
        for layer in self.letting_go:
            valid = self._real(self._stage_of(layer))
            if self.past_rows:
                past, before = self.past_rows[layer]
                before = valid.new_ones(len(valid), past) if before is None else before
                valid = torch.cat((before, valid), dim=1)
            held[layer] = valid[:, 1 - self.kinds[layer].window :].sum(1).tolist()
        return held

    def _stage_of(self, layer: int) -> StageRecord | None:
        """The last decision before a layer."""
        earlier = [stage for stage in self.stages if stage.layer <= layer]
        return earlier[-1] if earlier else None

    def _real(self, stage: StageRecord | None) -> Tensor:
        """Which rows are no padding, after a decision, or in the prompt: bool [B, K]."""
        if stage is not None:
            real = stage.valid
            return torch.ones_like(stage.origin, dtype=torch.bool) if real is None else real
        width, device = self.prompt_visual.shape[1], self.prompt_visual.device
        rows = torch.tensor(_add([self.text], [self.visual])[0], device=device)
        return torch.arange(width, device=device) >= width - rows[:, None]

    def _kept(self, stage: StageRecord) -> Tensor:
        return self._columns_there(stage).cpu()

    def _scores(self, ranked: Ranked) -> Tensor:
        """float32 [B, S]: what the input columns were ranked by; NaN where they were not."""
        out = torch.full(self.prompt_visual.shape, torch.nan)
        origin = ranked.origin.cpu()
        for scores, among in ranked.by:
            prompt, row = among.cpu().nonzero(as_tuple=True)
            out[prompt, origin[prompt, row]] = scores.cpu()[prompt, row].float()
        return out

    def _columns_there(self, stage: StageRecord | None) -> Tensor:
        """bool [B, S]: the input columns that are left after a decision."""
        real = self._real(stage)
        if stage is None:
            return real
        kept = torch.zeros_like(self.prompt_visual)
        # Padding names column 0 as its origin: added up, it does not overwrite a row that stayed.
        return kept.to(torch.int8).scatter_add(1, stage.origin, real.to(torch.int8)).bool()

    def _flops(
        self,
        tokens: list[list[int]],
        visual: list[list[int]],
        keys: list[list[int]],
        attention: list[dict[int, Attention]],
    ) -> list[int]:
        """Of each layer, all prompts."""
        by_prompt = (zip(*counts, strict=True) for counts in (tokens, visual, keys))
        spent = [
            layer_flops(self.config, n, visual=v, keys=m, attention=a)
            for n, v, m, a in zip(*by_prompt, attention, strict=True)
        ]
        return [sum(of_layer) for of_layer in zip(*spent, strict=True)]

    def _deciding(self) -> int:
        """What the method itself computed besides running the model, of all prompts."""
        spent, text, visual = 0, self.text, self.visual
        for stage in self.stages:
            kept = on_host(stage.visual)
            for rows in zip(text, visual, kept, strict=True):
                spent += self.method.decision_flops(stage.layer, self.config, *rows)
            text, visual = on_host(stage.text), kept
        return spent

    def _attention(
        self, text: list[list[int]], visual: list[list[int]], past: list[list[int]]
    ) -> list[dict[int, Attention]]:
        """What passive layers compute in their attention, by prompt and layer."""
        return [
            {
                layer: passive_attention(
                    text=text[layer][b],
                    visual=visual[layer][b],
                    before_visual=spans.before_last,
                    past=past[layer][b],
                    passive=passive,
                )
                for layer, passive in self.passive.items()
            }
            for b, spans in enumerate(self._spans())
        ]

    def _visual_pairs(self, tokens: list[list[int]], text: list[list[int]]) -> int:
        """(Query, key) pairs that have weight, with a visual token among them."""
        spans = self._spans() if self.passive else []
        pairs, width = 0, self.prompt_visual.shape[1]
        columns = torch.arange(self.end - width, self.end, device=self.prompt_visual.device)
        for layer, counts in enumerate(zip(tokens, text, strict=True)):
            if layer in self.linear:
                continue
            reach = reach_of(
                self.kinds[layer], columns.expand_as(self.prompt_visual), self.end, self.blocks
            )
            if reach is not None and layer not in self.passive:
                there = self._columns_there(self._stage_of(layer))
                pairs += pairs_with_visual(there, self.prompt_visual, reach, self.end - width)
                continue
            for b, (n, t) in enumerate(zip(*counts, strict=True)):
                passive = self.passive.get(layer)
                if passive is None:
                    pairs += n * (n + 1) // 2 - t * (t + 1) // 2
                else:
                    pairs += visual_pairs(n - t, spans[b], passive)
        return pairs

    def _spans(self) -> list[Spans]:
        """How text and visual tokens follow upon each other in each prompt."""
        spans = []
        for row, text, images in zip(
            self.prompt_visual.tolist(), self.text, self.visual, strict=True
        ):
            before, seen, sum_before, after_first = 0, 0, 0, 0
            for is_visual in row[len(row) - text - images :]:
                if is_visual:
                    seen, sum_before, last = seen + 1, sum_before + before, before
                else:
                    before += 1
                    after_first += seen > 0
            spans.append(Spans(last if seen else 0, sum_before, after_first))
        return spans

    def _kv_bytes(self, keys: list[list[int]]) -> int:
        config = self.config
        per_token = 2 * config.num_key_value_heads * head_dim(config) * self.bytes_per_number
        held = (sum(counts) for layer, counts in enumerate(keys) if layer not in self.linear)
        return per_token * sum(held)

    def _events(self) -> list[dict[str, Any]]:
        events, before, text_before = [], self.visual, self.text
        for stage in self.stages:
            text, visual = on_host(stage.text), on_host(stage.visual)
            event = {
                "layer": stage.layer,
                "event": "pruned",
                "visual_before": before,
                "visual_after": visual,
            }
            if text != text_before:
                event |= {"text_before": text_before, "text_after": text}
            events.append(event)
            before, text_before = visual, text
        noted = self.method.events(self.memory)
        return sorted(events + noted, key=lambda event: event["layer"])


def _add(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    return [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]


def _course(before: int, counts: list[int]) -> str:
    """As 8 from layer 2, 3 from layer 4."""
    runs = []
    for layer, count in enumerate(counts):
        if count != before:
            runs.append(f"{count} from layer {layer}")
        before = count
    return ", ".join(runs) or "all stay"


def _si(number: int) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number} "
