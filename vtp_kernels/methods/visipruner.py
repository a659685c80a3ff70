"""VisiPruner (arXiv 2510.17205): passive visual tokens, then the few that matter, then none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.checks import check_depth
from vtp_kernels.contract.method import Method, parse_settings
from vtp_kernels.contract.passive import PassiveVisual

from .budget import check_layer
from .schedule import Schedule

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["VisiPruner"]

STAGES = ("shallow", "middle", "deep")
SHALLOW_ATTENTION = ("exact", "skip")
FIRST_LAYER = ("merge_first", "keep_second_half")
VISUAL_ATTENTION = ("causal", "none")
DECISIONS = ("exact", "pipelined", "fixed")


@dataclass(frozen=True)
class VisiPruner(Method, key="visipruner"):
    """Three stages, each of which may be left out. The defaults are those of the published code.

    Shallow (section 3.6), layers 0 to `shallow_layers` - 1: text takes nothing from visual tokens.
    Middle, from layer `shallow_layers` + 1 on: in each layer the last prompt token tells what every
    visual token contributes to its attention output (`vtp_kernels.token_contribution`). In the
    first layer where leaving out some token turns that output (cosine below `fusion_threshold`),
    fusion has happened: the tokens whose contribution is longer than `token_threshold` stay, and
    all others leave before the next layer. Deep, after that: a layer in which every token that
    stayed could be left out (cosine at least `exit_threshold`) votes for the exit; with
    `exit_votes` votes all visual tokens leave before the next layer.

    Every prompt of a batch decides for itself.

    Parameters
    ----------
    stages : any of "shallow", "middle", "deep"
        Without "middle" the votes begin where it would have, with all visual tokens.
    shallow_layers : int
        With 0 contributions count from layer 0 on.
    fusion_threshold, token_threshold, exit_threshold : float
    exit_votes : int
    consecutive_votes : bool
        False: votes add up, as in the published code. True: they must follow upon each other, as in
        the paper.
    shallow_attention : "exact" | "skip"
        "exact": the published arithmetic, in which weights on visual tokens are set to zero after
        the softmax, so that they stay in its denominator. "skip": visual tokens pay no attention,
        and text attends to text and the first visual token alone, by a softmax over these.
    shallow_first_layer : "merge_first" | "keep_second_half"
        In layer 0, for shallow_attention="exact": all weight that text gives to visual tokens goes
        to the first of them (code for 7B), or only the weight on the first half is removed (13B).
    shallow_visual_rows : "causal" | "none"
        Shallow layers after layer 0, for shallow_attention="exact": visual tokens attend to each
        other as usual (published code), or only to the text before them (paper).
    drop_shallow_kv : bool
        Visual tokens also leave the KV cache of the shallow layers once the prompt has been read
        (paper); the published code keeps them there.
    decision : "exact" | "pipelined" | "fixed"
        "exact": the host reads one small tensor at every layer that is undecided. "pipelined": it
        reads what it asked for a layer earlier, so nothing waits, and tokens leave one layer later.
        "fixed": `schedule` says when how many leave, ranked by their contribution: nothing is read.
    schedule : Schedule
        For decision="fixed": what `vtp_kernels.calibrate` makes of this method and some prompts.
    min_keep : int
        Fusion leaves at least so many tokens, those that contribute most, where fewer are above
        `token_threshold`. (The paper has no such floor; on small models a handful of keys is too
        few for what later layers do with them.) The exit takes them all the same.
    """

    stages: tuple[str, ...] = STAGES
    shallow_layers: int = 6
    fusion_threshold: float = 0.995
    token_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_votes: int = 2
    consecutive_votes: bool = False
    shallow_attention: str = "exact"
    shallow_first_layer: str = "merge_first"
    shallow_visual_rows: str = "causal"
    drop_shallow_kv: bool = False
    decision: str = "exact"
    schedule: Schedule | None = None
    min_keep: int = 0

    def __post_init__(self) -> None:
        stages = (self.stages,) if isinstance(self.stages, str) else tuple(self.stages)
        if not set(stages) <= set(STAGES) or len(set(stages)) < len(stages):
            raise ValueError(
                f"VisiPruner.stages: expected some of {STAGES}, got {shown(self.stages)}"
            )
        object.__setattr__(self, "stages", tuple(x for x in STAGES if x in stages))
        check_layer(self.shallow_layers, "VisiPruner.shallow_layers")
        for name in ("fusion_threshold", "token_threshold", "exit_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"VisiPruner.{name}: expected a number, got {shown(value)}")
            if not math.isfinite(value):
                raise ValueError(f"VisiPruner.{name}: expected a finite number, got {value}")
        for name, least in (("exit_votes", 1), ("min_keep", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"VisiPruner.{name}: expected an int, got {shown(value)}")
            if value < least:
                raise ValueError(f"VisiPruner.{name}: expected at least {least}, got {value}")
        for name, choices in (
            ("shallow_attention", SHALLOW_ATTENTION),
            ("shallow_first_layer", FIRST_LAYER),
            ("shallow_visual_rows", VISUAL_ATTENTION),
            ("decision", DECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"VisiPruner.{name}: got {shown(getattr(self, name))}, expected one of "
                    f"{choices}"
                )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", Schedule.from_dict(dict(self.schedule)))
        if (self.decision == "fixed") != (self.schedule is not None):
            raise ValueError(
                'VisiPruner.schedule: decision="fixed" needs a Schedule and no other decision '
                f"takes one, got decision={shown(self.decision)} and "
                f"schedule={shown(self.schedule)}"
            )
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(f"VisiPruner.schedule: expected a Schedule, got {shown(self.schedule)}")

    # ---- where it acts ------------------------------------------------------------------------

    @property
    def first_judged_layer(self) -> int:
        """The first layer whose contributions count. The one after the shallow layers is left
        alone; without shallow layers there is none to leave alone."""
        return self.shallow_layers + 1 if self.shallow_layers else 0

    @property
    def _judges(self) -> bool:
        return self.decision != "fixed" and bool({"middle", "deep"} & set(self.stages))

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        if self.schedule is not None:
            return self.schedule.decision_layers(depth)
        return tuple(range(self.first_judged_layer + 1, depth)) if self._judges else ()

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        if self.schedule is not None:
            return self.schedule.observed_layers(depth)
        return tuple(range(self.first_judged_layer, depth - 1)) if self._judges else ()

    def passive_layers(self, depth: int) -> dict[int, PassiveVisual]:
        if "shallow" not in self.stages:
            return {}
        if self.shallow_attention == "skip":
            skip = PassiveVisual("merge", "skip", renormalize=True)
            return dict.fromkeys(range(self.shallow_layers), skip)
        rows = "causal" if self.shallow_visual_rows == "causal" else "prefix"
        passive = dict.fromkeys(range(self.shallow_layers), PassiveVisual("drop", rows))
        if self.shallow_first_layer == "merge_first":
            first = PassiveVisual("merge", "prefix")
        else:
            first = PassiveVisual("drop", "prefix", spare_second_half=True)
        return passive | ({0: first} if passive else {})

    def forgetful_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(self.shallow_layers)) if self.drop_shallow_kv else ()

    def needs_units(self) -> bool:
        return self.schedule is not None and self.schedule.needs_units()

    def visual_left(self, layer: int, pictures: Sequence[int]) -> int | None:
        return None if self.schedule is None else self.schedule.visual_left(layer, pictures)

    def visual_most(self, layer: int, pictures: Sequence[int]) -> int:
        return sum(pictures) if self.schedule is None else self.visual_left(layer, pictures)

    def decides_by_data(self, depth: int) -> str | None:
        return f"decision={self.decision!r} looks at the pictures for it" if self._judges else None

    def check_model(self, depth: int) -> None:
        if self.shallow_layers and ("shallow" in self.stages or self.drop_shallow_kv):
            check_depth(self.shallow_layers - 1, depth, "VisiPruner.shallow_layers")
        if self.schedule is not None:
            self.schedule.check_model(depth)

    # ---- what it decides ----------------------------------------------------------------------

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        if self.schedule is not None:
            return self.schedule.decide(layer, rows)
        judge = rows.memory.get("judge")
        if judge is None:
            judge = rows.memory["judge"] = Judge(self, rows)
        return judge.decide(layer, rows)

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        return memory["judge"].events() if "judge" in memory else []

    @classmethod
    def from_spec(cls, arguments: str) -> VisiPruner:
        """`FIELD=VALUE,...`, as in `visipruner:fusion_threshold=0.99,shallow_attention=skip`"""
        return cls(**parse_settings(arguments, _FIELDS))


def _stages(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split("+")))


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text == "true"


# How a setting is written on the command line.
_FIELDS = {
    "stages": _stages,
    "shallow_layers": int,
    "fusion_threshold": float,
    "token_threshold": float,
    "exit_threshold": float,
    "exit_votes": int,
    "min_keep": int,
    "consecutive_votes": _bool,
    "shallow_attention": str,
    "shallow_first_layer": str,
    "shallow_visual_rows": str,
    "drop_shallow_kv": _bool,
    "decision": str,
}


class Judge:
    """The state of a batch of prompts from layer to layer. It lives on their device: the host only
    reads how many tokens each prompt is left with."""

    def __init__(self, method: VisiPruner, rows: PromptRows) -> None:
        self.method = method
        self.alive = rows.in_columns(rows.visual.float(), 0.0) > 0  # [B, columns]
        has_tokens = self.alive.any(1)
        self.fused = ~has_tokens if "middle" in method.stages else torch.ones_like(has_tokens)
        self.votes = torch.zeros_like(self.fused, dtype=torch.int64)
        self.pending: tuple[Tensor, Tensor, Any] | None = None
        self.noted: list[tuple[int, dict[str, Tensor]]] = []  # events, as bool [B] each
        self.open = True  # whether any prompt can still lose visual tokens

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        if not self.open or not any(rows.visual_now):
            return None
        cosine, norm = rows.token_contribution()
        rows.note_scores(norm, rows.visual)
        self._look(layer - 1, cosine, norm, rows)
        verdict = self._ask()
        if self.method.decision == "pipelined":
            self.pending, verdict = verdict, self.pending
        if verdict is None:
            return None
        alive, answer, done = verdict
        if done is not None:
            done.synchronize()
        counts, fused = answer.tolist()
        self.open = "deep" in self.method.stages or not all(fused)
        if counts == rows.visual_now:
            return None
        return rows.keep_where(alive.gather(1, rows.origin), counts)

    def _look(self, layer: int, cosine: Tensor, norm: Tensor, rows: PromptRows) -> None:
        """Move on by one layer's contributions, [B, S] each."""
        method, fused = self.method, self.fused
        cosine, norm = rows.in_columns(cosine, 1.0), rows.in_columns(norm, 0.0)
        turns = (self.alive & (cosine < method.fusion_threshold)).any(1) & ~fused
        leaves = torch.zeros_like(turns)
        if "deep" in method.stages:
            spare = ((cosine >= method.exit_threshold) | ~self.alive).all(1) & fused
            votes = self.votes + spare
            self.votes = torch.where(spare, votes, 0) if method.consecutive_votes else votes
            leaves = (self.votes >= method.exit_votes) & self.alive.any(1)
        stays = ~turns[:, None] | (norm > method.token_threshold) | self._best(norm)
        self.alive = self.alive & stays & ~leaves[:, None]
        self.fused = fused | turns
        self.noted.append((layer, {"fusion": turns, "exit": leaves}))

    def _best(self, norm: Tensor) -> Tensor:
        """The `min_keep` tokens that contribute most; more where the last of them has equals."""
        count = min(self.method.min_keep, norm.shape[1])
        if count == 0:
            return torch.zeros_like(self.alive)
        norm = norm.masked_fill(~self.alive, -math.inf)
        return norm >= norm.topk(count).values[:, -1:]

    def _ask(self) -> tuple[Tensor, Tensor, Any]:
        """What is alive, and on its way to the host: tokens left, and whether fusion happened."""
        answer = torch.stack((self.alive.sum(1), self.fused.long()))
        if not answer.is_cuda:
            return self.alive, answer, None
        host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
        host.copy_(answer, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return self.alive, host, done

    def events(self) -> list[dict[str, Any]]:
        """Which prompts fused and left in which layer; waits for the GPU."""
        return [
            {"layer": layer, "event": event, "prompts": happened.nonzero()[:, 0].tolist()}
            for layer, noted in self.noted
            for event, happened in noted.items()
            if happened.any()
        ]
