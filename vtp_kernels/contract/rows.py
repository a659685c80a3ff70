"""The prompt's rows at the entry of a layer, as a method sees them, and what it answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels._shown import shown
from vtp_kernels.ops import (
    assign_rows,
    attention_scores,
    compact_rows,
    inflection,
    merge_rows,
    select_diverse,
    select_topk,
    token_contribution,
)
from vtp_kernels.ops._checks import ANY, BOOL, INT64, integer, tensor
from vtp_kernels.ops._dispatch import FLOATS
from vtp_kernels.ops.attention_topk import run as run_attention_topk
from vtp_kernels.selection import Selection

from .backends import Backends
from .counts import Counts, added, moved, on_device, on_host
from .facts import Fact, asked_stay, check_fit, demand, equal, host_counts
from .frames import Video, videos_of
from .groups import Groups, marked
from .seen import Observed, Sight
from .unit import Unit, Units
from .vision import PromptVision

__all__ = ["KINDS", "Kept", "PromptRows"]

KINDS = ("text rows", "visual tokens")
LOGITS = 1 << 24
"""Of rows in a sliding window, how many are computed at once: 64 MiB."""


class Kept(NamedTuple):
    """The rows that stay, and how many of them each prompt has. Counts that only the device knows
    are tensors; the selection is then as wide as a prompt might need, and the rest is padding.

    `keep_visual`, `keep_where` and `keep_rows` of PromptRows make one. One that is put together by
    hand is checked before it is carried out."""

    selection: Selection
    text: Counts
    visual: Counts
    hidden: Tensor | None = None
    """[B, S, C], like that of PromptRows: what the rows hold from here on, where some that stay
    have taken in others (`with_content`). None: what they held."""


class PromptRows:
    """The rows of a batch of prompts at the entry of a layer.

    B prompts of S rows each, padding included. Rows that have left are not among them.

    Whoever asks for `units`, `unit` or `unit_counts` says so by `needs_units`; else the first to
    ask waits for the GPU. They raise NotImplementedError where a family's inputs do not tell.

    Attributes
    ----------
    hidden : float [B, S, C]
        What the layer is about to read.
    visual, text : bool [B, S]
        Which rows are visual tokens, and which are anything else but padding.
    valid : bool [B, S] or None
        False for padding; None if there is none.
    origin : int64 [B, S]
        Where each row stood in the input.
    visual_at_start : list of int
        Visual rows per prompt when the prompt came in.
    visual_now, text_now : list of int, or int64 [B]
        Rows per prompt at this layer; on the device where an earlier decision left them there.
    text_before : list of int
        Of the prompt as it came: text rows before its first visual row, all where it has none.
    visual_ordinal : int64 [B, S]
        For visual rows: the how-many-th visual token of the prompt it was, from 0.
    prompt_end : int
        Row of the last prompt token; rows after it are drafts of assisted decoding.
    columns : int
        Columns of the input, which `origin` counts.
    depth : int
        Decoder layers of the model.
    memory : dict
        For the method to note things from one decision of this call to the next.
    past : int
        Keys that came before these rows, in the layer that was observed.
    vision : PromptVision or None
        What the vision tower saw, for methods that ask for it.
    units : list of lists of Unit
        The pictures and frames of each prompt, in the order in which they stand in it.
    unit : int64 [B, S]
        For visual rows: which of these they are of; -1 for all others.
    unit_counts : list of lists of int
        Visual rows of each when the prompt came in.
    between_frames : bool [B, columns], on the CPU, or None
        Input columns between the frames of videos that show none, such as timestamps; None where
        there are no videos.
    """

    def __init__(
        self,
        *,
        hidden: Tensor,
        visual: Tensor,
        valid: Tensor | None,
        origin: Tensor,
        prompt_visual: Tensor,
        visual_at_start: list[int],
        visual_now: Counts,
        text_now: Counts,
        text_before: list[int],
        drafts: int,
        columns: int,
        depth: int,
        memory: dict[str, Any],
        observation: Observed | None,
        past: int,
        key_valid: Callable[[], Tensor | None],
        sight: Sight | None,
        vision: PromptVision | None,
        units: Units,
        backends: Backends,
    ) -> None:
        self.hidden = hidden
        self.visual = visual
        self.valid = valid
        self.text = ~visual if valid is None else valid & ~visual
        self.origin = origin
        self._prompt_visual = prompt_visual
        self.visual_at_start = visual_at_start
        self.visual_now = visual_now
        self.text_now = text_now
        self.text_before = text_before
        self.drafts = drafts
        self.prompt_end = hidden.shape[1] - 1 - drafts
        self.columns = columns
        self.depth = depth
        self.memory = memory
        self.past = past
        self.vision = vision
        self._units = units
        self.asker = "decide"  # who is at fault where something cannot be
        self.made: list[Kept] = []  # what is known to be possible
        self.ranked: list[tuple[Tensor, Tensor]] = []  # scores and among which rows, for report()
        self._key_valid, self._sight = key_valid, sight
        self._observation = observation
        self._backends, self._backend = backends, backends.asked

    @property
    def visual_ordinal(self) -> Tensor:
        return (self._prompt_visual.cumsum(1) - 1).gather(1, self.origin)

    def moved(self, x: Tensor) -> Tensor:
        """A tensor of the CPU where the rows are, without waiting for the GPU."""
        return moved(x, self.visual.device)

    @property
    def units(self) -> list[list[Unit]]:
        return self._units.all

    @property
    def unit(self) -> Tensor:
        numbers = self._units.numbers(self.origin.device).gather(1, self.origin)
        return numbers.masked_fill(~self.visual, -1)

    @property
    def between_frames(self) -> Tensor | None:
        return self._units.between_frames if self._units.videos else None

    @property
    def unit_counts(self) -> list[list[int]]:
        return self._units.counts(self._prompt_visual)

    def videos(self, pictures: bool = False) -> list[Video]:
        """The videos of all prompts, before anything has left.

        pictures: the pictures of a prompt are the frames of one more. Raises ValueError where
        frames of a video have unlike numbers of tokens.
        """
        where = f"{self.asker}: videos"
        if self.hidden.shape[1] != self.columns:
            raise ValueError(f"{where}: some of their rows have left already")
        here = self._units.visual_rows(self._prompt_visual)
        return [
            Video(prompt, columns, here[prompt, columns])
            for prompt, found in enumerate(videos_of(self.units, pictures, where))
            for columns in found
        ]

    def tokens_of(self, video: Video) -> Tensor:
        """`hidden` of its tokens: float [T, N, C]."""
        return self.hidden[video.prompt, self.moved(video.columns)]

    def attention_scores(
        self,
        rows: slice,
        query_valid: Tensor | None = None,
        *,
        among: Tensor | None = None,
        support: str = "all",
        rotary: bool = True,
        causal: bool = True,
    ) -> Tensor:
        """Attention that `rows` paid in the observed layer: float32 [B, S], 0 off the rows scored.

        Mean over rows (those `query_valid` bool [B, M] allows) and over heads.

        Parameters
        ----------
        rows : the rows that pay it
        query_valid : bool [B, M]
        among : bool [B, S]
            The rows that are scored; by default the visual ones.
        support : "all" | "candidates"
            Softmax over everything a row sees, or over the scored rows alone.
        rotary : bool
            False: queries and keys as they are before the rotary embedding, so that what is near
            has no advantage. Keys that came before this call are then left out.
        causal : bool
            False: rows also see what comes after them.
        """
        past, observation = self.past if rotary else 0, self._observed()
        among = self.visual if among is None else among
        first, last = _ends(rows, self.hidden.shape[1])
        if last - first > 1 and self._in_window(causal):
            return self._scores_in_windows(rows, query_valid, among, support, rotary)
        query, options = self._asked_of(observation, rows, query_valid, rotary, causal)
        return self._scores_of(query, options, past, among, support)

    def _in_window(self, causal: bool) -> bool:
        """Whether rows do not see all keys before them, but each from another one on."""
        if self._sight is None or self._sight.first is None:
            return False
        if not causal:
            raise NotImplementedError(
                f"{self.asker}: the layer before sees a sliding window, and there is no telling "
                "what rows would see there of what comes after them (causal=False); let the method "
                "look at a layer that sees all rows"
            )
        return True

    def _scores_in_windows(
        self, rows: slice, query_valid: Tensor | None, among: Tensor, support: str, rotary: bool
    ) -> Tensor:
        """The same of rows each of which sees keys from another one on. The op knows of last keys
        alone, so a row is a batch entry of its own here, with keys of its own that are valid; all
        entries read the same keys."""
        past, observation = self.past if rotary else 0, self._observed()
        query, options = self._asked_of(observation, rows, query_valid, rotary)
        key, valid = options.pop("key"), options.pop("valid")
        last, counts = options.pop("query_positions"), options.pop("query_valid")
        columns = self._sight.columns[:, self.past - past :]
        first = self._sight.first[:, rows]
        candidates, total = behind(past, among), [0.0] * len(query)
        at_once = max(1, LOGITS // (query.shape[1] * key.shape[2]))
        starts = range(0, query.shape[2], at_once)
        for prompt, start in itertools.product(range(len(query)), starts):
            part = slice(start, start + at_once)
            seen = columns[prompt] >= first[prompt, part, None]
            paid = attention_scores(
                query[prompt, :, part].transpose(0, 1)[:, :, None],
                key[prompt].expand(len(seen), -1, -1, -1),
                candidates=candidates[prompt].expand(len(seen), -1),
                valid=seen if valid is None else seen & valid[prompt],
                query_positions=last[prompt, part, None],
                support=support,
                **options,
            )
            if counts is not None:
                paid = paid * counts[prompt, part, None]
            total[prompt] = total[prompt] + paid.sum(0)
        number = query.shape[2] if counts is None else counts.sum(1, keepdim=True).clamp(min=1)
        return observation.heads(query).mean(torch.stack(total) / number, query)[:, past:]

    def _scores_of(
        self, query: Tensor, options: dict[str, Any], past: int, among: Tensor, support: str = "all"
    ) -> Tensor:
        scores = attention_scores(query, candidates=behind(past, among), support=support, **options)
        return self._observed().heads(query).mean(scores, query)[:, past:]

    def _asked_of(
        self,
        observation: Observed,
        rows: slice,
        query_valid: Tensor | None,
        rotary: bool = True,
        causal: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the ops are to know of the observed layer: queries of `rows`, and all else."""
        past = self.past if rotary else 0
        first, last = _ends(rows, self.hidden.shape[1])
        positions = None
        valid = self._key_valid() if past else self.valid
        if last - first == 1 and self._in_window(causal):  # of several: see attention_scores
            valid = _both(valid, self._sight.keys(first)[:, self.past - past :])
        if causal and self._sight is not None:
            positions = self._sight.last(rows) - (self.past - past)
        elif causal and (last - first > 1 or last < self.hidden.shape[1]):
            positions = torch.arange(first, last, device=self.hidden.device) + past
            positions = positions.expand(self.hidden.shape[0], -1)
        return observation.queries(rows, rotary), {
            "key": observation.keys(past) if rotary else observation.unrotated_keys(),
            "valid": valid,
            "query_positions": positions,
            "query_valid": query_valid,
            "scale": observation.scale,
            "backend": self._backend,
        }

    def token_contribution(self) -> tuple[Tensor, Tensor]:
        """What the visual rows added to the observed layer's output for the last prompt token.

        (cosine, norm), float32 [B, S] each, as of the op of that name; 1 and 0 off visual tokens.
        """
        observation, end = self._observed(), self.prompt_end + 1
        keys = self.past + end  # drafts of assisted decoding come later
        valid = self._key_valid()
        if self._sight is not None:
            valid = _both(valid, self._sight.keys(end - 1))
        query = observation.queries(slice(end - 1, end))[:, :, 0]
        query, key, value = observation.heads(query).gather(
            query,
            observation.keys(self.past)[:, :, :keys],
            observation.values(self.past)[:, :, :keys],
        )
        parts = token_contribution(
            query,
            key,
            value,
            candidates=behind(self.past, self.visual)[:, :keys],
            valid=None if valid is None else valid[:, :keys],
            scale=observation.scale,
            backend=self._backend,
        )
        after = self.hidden.shape[1] - end
        cosine, norm = (part[:, self.past :] for part in parts)
        return pad(cosine, (0, after), value=1.0), pad(norm, (0, after))

    def key_norms(self) -> Tensor:
        """float32 [B, S]: the L1 norm of the key of each row in the observed layer, over all heads
        together."""
        observation = self._observed()
        norms = observation.keys(self.past)[:, :, self.past :].float().abs().sum((1, 3))
        query = observation.queries(slice(self.prompt_end, self.prompt_end + 1))
        heads = observation.heads(query)
        return heads.mean(norms, query) * (heads.heads / query.shape[1])

    def _observed(self) -> Observed:
        if self._observation is None:
            raise RuntimeError(
                f"{self.asker}: no layer was observed: the method's observed_layers must name the "
                "layer before the one it decides at"
            )
        return self._observation

    def gather(self, mask: Tensor, counts: Counts) -> tuple[Tensor, Selection, Tensor | None]:
        """`hidden` of the rows in `mask` bool [B, S] alone, in order, `counts[b]` of each prompt:
        [B, N, C]; which rows these are; and which of the N are there, bool [B, N] (None: all).
        Counts of text may be those of `text_now`, whatever that is; others are a list."""
        where = f"{self.asker}: gather"
        tensor(f"{where}: mask", mask, "B, S", tuple(self.visual.shape), BOOL, self.visual.device)
        if self._may_be_there_only(counts):
            most, even = self.visual.shape[1] - min(on_host(self.visual_now)), False
        else:
            counts = host_counts(f"{where}: counts", counts, len(mask))
            demand(where, equal("rows", mask.sum(1), on_device(counts, mask.device)))
            most, even = max(counts), min(counts) == max(counts)
        selection = select_topk(
            torch.zeros(mask.shape, device=mask.device),
            0,
            keep=mask,
            capacity=most,
            backend=self._backend,
        )
        (hidden,) = compact_rows((self.hidden,), *selection, backend=self._backend)
        return hidden, selection, None if even else selection.indices >= 0

    def spread(self, values: Tensor, selection: Selection) -> Tensor:
        """Values [B, N] of selected rows, at the rows they are of: [B, S], 0 elsewhere."""
        length = self.hidden.shape[1]
        places = torch.where(selection.indices >= 0, selection.indices, length)
        return values.new_zeros(len(values), length + 1).scatter(1, places, values)[:, :-1]

    def in_columns(self, x: Tensor, fill: float) -> Tensor:
        """Values of rows [B, S] at the input columns they came from, [B, columns]; `fill` where no
        row is left. Padding must hold `fill` too."""
        out = x.new_full((x.shape[0], self.columns), fill)
        # Padding names column 0 as its origin: whatever stands there must win over it.
        real = x != fill
        columns = torch.where(real, self.origin, self.columns)
        return pad(out, (0, 1)).scatter(1, columns, x)[:, :-1]

    def best(self, scores: Tensor, among: Tensor, keep: int | float) -> Tensor:
        """bool [B, S]: the rows of `among` bool [B, S] with highest scores, `keep` of each prompt's
        or, given a float, that share of them (halves rounded up)."""
        self.note_scores(scores, among)
        k = keep
        if isinstance(keep, float):
            k = (among.sum(1).double() * keep + 0.5).floor().to(torch.int32)
        width = among.shape[1]
        chosen = select_topk(scores, k, candidates=among, capacity=width, backend=self._backend)
        return marked(chosen.indices, width)

    def up_to_knee(self, scores: Tensor, among: Tensor, **rule: Any) -> Tensor:
        """bool [B, S]: the rows of `among` bool [B, S] up to the knee of their sorted scores; all
        of them where there is none. `rule` as of `vtp_kernels.inflection`."""
        self.note_scores(scores, among)
        curve = scores.masked_fill(~among, torch.nan)  # what is not a number is on no curve
        chosen = inflection(curve, **rule, backend=self._backend)
        return marked(chosen.indices, among.shape[1]) & among

    def keep_rows(
        self,
        stays: Tensor,
        *,
        counts: tuple[list[int], list[int]] | None = None,
        capacity: int | None = None,
    ) -> Kept:
        """Keep the rows where `stays` bool [B, S], text or visual.

        `counts` are the numbers of text and visual rows that these are, by prompt. Where the caller
        does not know them, the host asks the device: one small read. Given a `capacity` that no
        prompt exceeds, nothing is read: prompts are padded to it.

        Raises ValueError for the last prompt token or drafts that would leave, counts that are not
        those of `stays`, a capacity that some prompt exceeds; what of it the host cannot know stops
        the GPU instead.
        """
        batch, width = self.visual.shape
        where = f"{self.asker}: keep_rows"
        tensor(f"{where}: stays", stays, "B, S", (batch, width), BOOL, self.visual.device)
        if self.valid is not None:
            stays = stays & self.valid
        if capacity is not None:
            integer(f"{where}: capacity", capacity, 0)
        found = self.numbers_of(stays)
        if counts is not None:
            text, visual = self._given(where, counts)
            expected = [
                x if isinstance(x, Tensor) else on_device(x, stays.device) for x in (text, visual)
            ]
            demand(where, *map(equal, KINDS, found, expected), asked_stay(found[2], self.drafts))
        elif capacity is None:
            text, visual, asked = torch.stack(found).tolist()
            demand(where, asked_stay(torch.tensor(asked), self.drafts))
        else:
            text, visual, asked = found
            demand(where, _fit(text + visual, capacity), asked_stay(asked, self.drafts))
        totals = added(text, visual)
        if capacity is None:
            capacity = self._room(text, visual)
        elif totals is not None and max(totals) > capacity:
            raise ValueError(f"{where}: capacity: {capacity} for {max(totals)} rows that stay")
        return self._keep(stays, text, visual, min(capacity, width))

    def keep_where(self, kept: Tensor, counts: list[int]) -> Kept:
        """Keep all text, and the visual tokens where `kept` bool [B, S]: `counts[b]` per prompt.

        Raises ValueError for counts that are not those of `kept`; what of it the host cannot know
        stops the GPU instead.
        """
        where = f"{self.asker}: keep_where"
        batch, width = self.visual.shape
        tensor(f"{where}: kept", kept, "B, S", (batch, width), BOOL, self.visual.device)
        counts = host_counts(f"{where}: counts", counts, batch)
        check_fit(where, KINDS[1], counts, self.visual_now)
        kept = self.visual & kept
        demand(where, equal(KINDS[1], kept.sum(1), on_device(counts, kept.device)))
        text = self._text_counts()
        return self._keep(self.text | kept, text, counts, self._room(text, counts))

    def keep_visual(self, counts: list[int], scores: Tensor | None) -> Kept:
        """Keep all text, and of each prompt's visual tokens the `counts[b]` with highest scores.

        `scores` float32 [B, S]; None where no prompt has a choice to make (all or none stay).
        Equal scores: the earlier token stays; what is not a number ranks last. Raises ValueError
        for counts that exceed `visual_now`.
        """
        where = f"{self.asker}: keep_visual"
        batch, width = self.visual.shape
        counts = self._fitting(where, counts)
        text, there = self._text_counts(), on_host(self.visual_now)
        if scores is None:
            if any(0 < count < most for count, most in zip(counts, there, strict=True)):
                raise ValueError(f"{where}: scores: there is a choice to make, got None")
            scores = torch.zeros(self.visual.shape, device=self.visual.device)
        else:
            tensor(f"{where}: scores", scores, "B, S", (batch, width), FLOATS, self.visual.device)
            self.note_scores(scores, self.visual)
        selection = select_topk(
            scores,
            on_device(counts, self.visual.device),
            candidates=self.visual,
            keep=self.text,
            capacity=self._room(text, counts),
            backend=self._backend,
        )
        return self._made(Kept(selection, text, counts))

    def keep_of_each(
        self, group: Tensor, there: list[list[int]], counts: list[list[int]], scores: Tensor | None
    ) -> Kept:
        """Keep all text, and of each group of visual tokens the best: of group g of prompt b, which
        has `there[b][g]` rows, `counts[b][g]`.

        group int64 [B, S]: of every visual row, by the number that it has in these lists. scores:
        float32 [B, S]; None where no group has a choice to make. Equal scores: the earlier token
        stays; what is not a number ranks last. Raises ValueError for counts that exceed what is
        there; what of it the host cannot know stops the GPU.
        """
        where = f"{self.asker}: keep_of_each"

        def best(rows: Tensor, here: Tensor, k: int | Tensor, capacity: int) -> Selection:
            if scores is None:
                ranked = torch.zeros(rows.shape, device=rows.device)
            else:
                self.note_scores(scores, self.visual)
                ranked = scores.flatten()[rows]
            return select_topk(ranked, k, candidates=here, capacity=capacity, backend=self._backend)

        return self._keep_of_groups(where, group, there, counts, best)

    def keep_diverse(
        self,
        group: Tensor,
        there: list[list[int]],
        counts: list[list[int]],
        *,
        rule: str,
        relevance: Tensor | None = None,
    ) -> Kept:
        """`keep_of_each` of visual tokens whose `hidden` differ: those that `vtp.select_diverse`
        chooses in each group.

        rule: "maxmin", or "dpp" with the `relevance` of each token, float32 [B, S]. Where the
        determinant allows of fewer tokens than `counts` says, the most relevant of the others fill
        up, so that the host knows how many stay.
        """
        where = f"{self.asker}: keep_diverse"
        batch, width, channels = self.hidden.shape
        if relevance is not None:
            tensor(f"{where}: relevance", relevance, "B, S", (batch, width), FLOATS, group.device)

        def differing(rows: Tensor, here: Tensor, k: int | Tensor, capacity: int) -> Selection:
            told = None if relevance is None else relevance.flatten()[rows]
            found = select_diverse(
                self.hidden.reshape(-1, channels)[rows].detach(),
                k,
                rule=rule,
                relevance=told,
                candidates=here,
                capacity=capacity,
                backend=self._backend,
            )
            if rule != "dpp":
                return found
            chosen = marked(found.indices, rows.shape[1])
            return select_topk(
                torch.zeros(rows.shape, device=rows.device) if told is None else told,
                k - found.counts,
                candidates=here & ~chosen,
                keep=chosen,
                capacity=capacity,
                backend=self._backend,
            )

        return self._keep_of_groups(where, group, there, counts, differing)

    def keep_of_videos(self, videos: list[Video], counts: list[int], scores: list[Tensor]) -> Kept:
        """Keep all of each prompt, but of each of `self.videos()` only the `counts[v]` tokens with
        the highest `scores[v]`, float [T, N].

        Equal scores: the earlier token stays; what is not a number ranks last. Pictures, rows that
        show nothing, as `image_newline`, and rows whose logits are asked for stay.
        """
        where = f"{self.asker}: keep_of_videos"
        host_counts(f"{where}: counts", counts, len(videos))
        shape, device = self.visual.shape, self.visual.device
        group = torch.zeros(shape, dtype=torch.int64)  # 0 is what stays
        there = [[count] for count in self.visual_at_start]
        stay = [[count] for count in self.visual_at_start]
        dtype = scores[0].dtype if scores else torch.float32
        ranked = torch.full(shape, torch.nan, dtype=dtype, device=device)
        for video, count, score in zip(videos, counts, scores, strict=True):
            sizes = tuple(video.columns.shape)
            tensor(f"{where}: scores", score, "T, N", sizes, FLOATS, device)
            b, tokens = video.prompt, video.tokens
            group[b, video.columns[video.prunable]] = len(there[b])
            ranked[b, self.moved(video.columns)] = score
            for of_prompt, more in ((there[b], tokens), (stay[b], count)):
                of_prompt[0] -= tokens
                of_prompt.append(more)
        return self.keep_of_each(self.moved(group), there, stay, ranked)

    def _keep_of_groups(
        self,
        where: str,
        group: Tensor,
        there: list[list[int]],
        counts: list[list[int]],
        choose: Callable[[Tensor, Tensor, int | Tensor, int], Selection],
    ) -> Kept:
        """`choose` gets the rows int64 [G, N] of each group of each prompt, counted over the batch;
        which of them are there, bool [G, N]; how many of each stay; and the most of these. It
        answers with indices of the N."""
        total = [sum(of_prompt) for of_prompt in counts]
        for b, (some, most) in enumerate(zip(counts, there, strict=True)):
            check_fit(f"{where}, prompt {b}, group", KINDS[1], some, most)
        if not any(total) or counts == there:
            return self.keep_visual(total, None)
        groups = self._grouped(where, group, there)
        stay = [n for of_prompt in counts for n in of_prompt]
        found = choose(groups.rows, groups.here, on_device(stay, group.device), max(stay))
        return self.keep_where(groups.in_rows(groups.where(found.indices)), total)

    def grouped(self, group: Tensor, there: list[list[int]]) -> Groups:
        """The visual tokens of each group beside each other; `group` and `there` as of
        `keep_of_each`."""
        return self._grouped(f"{self.asker}: grouped", group, there)

    def _grouped(self, where: str, group: Tensor, there: list[list[int]]) -> Groups:
        shape = tuple(self.visual.shape)
        tensor(f"{where}: group", group, "B, S", shape, INT64, self.visual.device)
        rows = self._rows_of_groups(where, group, there)
        return Groups(rows, there, shape[1], self._backend)

    def keep_groups(self, groups: Groups, chosen: Tensor, counts: list[list[int]]) -> Kept:
        """Keep all text, and of each group the rows in `chosen` bool [G, N], which are `counts` of
        each prompt's groups."""
        return self.keep_where(groups.in_rows(chosen), [sum(of_prompt) for of_prompt in counts])

    def merge(
        self,
        kept: Kept,
        groups: Groups,
        targets: Tensor,
        among: Tensor,
        keys: Tensor,
        mode: str,
    ) -> tuple[Kept, Tensor]:
        """`kept`, with the rows `among` bool [G, N] merged into those of targets int64 [G, T] that
        are nearest by the cosine of `keys` [G, N, D], as `vtp.merge_rows` does it; and how many
        rows of each group were merged into others, int64 [G]."""
        assignment = assign_rows(keys, targets, candidates=among, backend=self._backend)
        hidden = groups.of(self.hidden).detach()
        content = merge_rows(hidden, assignment, targets, mode=mode, backend=self._backend)
        joined = (assignment >= 0).sum(1) - (targets >= 0).sum(1)
        return self.with_content(kept, *groups.by_prompt(targets, content)), joined

    def _rows_of_groups(self, where: str, group: Tensor, there: list[list[int]]) -> Tensor:
        """int64 [G, N]: the rows of each group of each prompt, in order, counted over the batch;
        behind the last of them any."""
        batch, width = self.visual.shape
        # Sorted by group each is a stretch, with what is in none behind the last.
        most = max(map(len, there))
        key = torch.where(self.visual, group, most)
        order = key.argsort(dim=1, stable=True)
        found = torch.zeros(batch, most + 1, dtype=torch.int64, device=group.device)
        found.scatter_add_(1, key.clamp(0, most), torch.ones_like(key))
        said = torch.tensor([[*some, *[0] * (most - len(some))] for some in there])
        same = (found[:, :most] == moved(said, group.device)).all(1)
        demand(where, Fact(same, lambda b: f"groups have not {there[b]} rows"))
        starts = [
            b * width + sum(some[:g]) for b, some in enumerate(there) for g in range(len(some))
        ]
        order = order + torch.arange(batch, device=group.device)[:, None] * width
        place = torch.arange(max(map(max, filter(None, there))), device=group.device)
        place = moved(torch.tensor(starts), group.device)[:, None] + place
        return order.flatten()[place.clamp(max=batch * width - 1)]

    def keep_attended(
        self, counts: list[int], rows: slice, query_valid: Tensor | None = None
    ) -> Kept:
        """`keep_visual` by the `attention_scores` of the same arguments, in one op."""
        observation = self._observed()
        first, last = _ends(rows, self.hidden.shape[1])
        if last - first > 1 and self._in_window(causal=True):
            return self.keep_visual(counts, self.attention_scores(rows, query_valid))
        query, options = self._asked_of(observation, rows, query_valid)
        heads = observation.heads(query)
        if self.past or heads.are_spread(query):  # scores must be put together before they rank
            scores = self._scores_of(query, options, self.past, self.visual)
            return self.keep_visual(counts, scores)
        text = self._text_counts()
        counts = self._fitting(f"{self.asker}: keep_attended", counts)
        k = on_device(counts, self.visual.device)
        per_prompt = isinstance(k, Tensor)
        options["backend"] = self._backends.of("attention_topk", query)
        selection, scores = run_attention_topk(
            query,
            k_per_row=k if per_prompt else None,
            k=0 if per_prompt else k,
            candidates=self.visual,
            keep=self.text,
            capacity=self._room(text, counts),
            **options,
        )
        self.note_scores(scores, self.visual)
        return self._made(Kept(selection, text, counts))

    def note_scores(self, scores: Tensor, among: Tensor) -> None:
        """Have report() tell what the rows of `among` bool [B, S] were ranked by: [B, S], the
        higher the longer they stay. Whatever ranks rows here notes it by itself."""
        self.ranked.append((scores, among))

    def with_content(self, kept: Kept, targets: Tensor, content: Tensor) -> Kept:
        """`kept`, with another content in some of the rows that stay: what rows that leave were
        merged to. Position, masks, and what the model adds between its layers stay the target's.

        targets: int64 [B, T], rows, none of them twice; -1 for none. content: [B, T, C], like
        `hidden`. Raises ValueError for targets that are no rows, or do not stay; what of it the
        host cannot know stops the GPU.
        """
        where, (batch, width, features) = f"{self.asker}: with_content", self.hidden.shape
        device, dtype = self.hidden.device, (self.hidden.dtype,)
        tensor(f"{where}: targets", targets, "B, T", (batch, ANY), INT64, device)
        shape = (batch, targets.shape[1], features)
        tensor(f"{where}: content", content, "B, T, C", shape, dtype, device)
        named = targets != -1
        places = torch.where((targets >= 0) & (targets < width), targets, width)
        stays = pad(marked(kept.selection.indices, width), (0, 1)).gather(1, places)
        once = torch.zeros(batch, width + 1, dtype=torch.int64, device=device)
        once.scatter_add_(1, places, named.long())
        demand(
            where,
            Fact((stays == named).all(1), lambda b: "targets: some are no rows that stay"),
            Fact((once <= 1).all(1), lambda b: "targets: a row is named twice"),
        )
        # What belongs to no row goes behind the last, and is cut off.
        hidden = pad(self.hidden if kept.hidden is None else kept.hidden, (0, 0, 0, 1))
        hidden.scatter_(1, places[..., None].expand(shape), content)
        merged = kept._replace(hidden=hidden[:, :width])
        return self._made(merged) if any(kept is own for own in self.made) else merged

    # ---- what is behind these ----------------------------------------------------------------

    def _keep(self, stays: Tensor, text: Counts, visual: Counts, capacity: int) -> Kept:
        scores = torch.zeros(stays.shape, device=stays.device)
        selection = select_topk(scores, 0, keep=stays, capacity=capacity, backend=self._backend)
        return self._made(Kept(selection, text, visual))

    def _text_counts(self) -> Counts:
        """Text rows of each prompt, on the host; in compiled code maybe on the device alone."""
        return self.text_now if torch.compiler.is_compiling() else on_host(self.text_now)

    def _room(self, text: Counts, visual: list[int]) -> int:
        """For the rows of the longest prompt, where all text stays and so many visual tokens."""
        totals = added(text, visual)
        if totals is not None:
            return max(totals)
        there = on_host(self.visual_now)
        return self.visual.shape[1] - min(a - b for a, b in zip(there, visual, strict=True))

    @staticmethod
    def _may_be_there_only(counts: Any) -> bool:
        """Whether these are counts that compiled code knows on the device alone."""
        return torch.compiler.is_compiling() and isinstance(counts, Tensor)

    def _fitting(self, where: str, counts: Any) -> list[int]:
        """`counts` of visual tokens as a list, if no prompt has fewer."""
        counts = host_counts(f"{where}: counts", counts, len(self.visual))
        check_fit(where, KINDS[1], counts, on_host(self.visual_now))
        return counts

    def _made(self, kept: Kept) -> Kept:
        self.made.append(kept)
        return kept

    def numbers_of(self, stays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many rows of a mask are text, visual, and such as logits are asked for: [B] each."""
        text, visual = stays & ~self.visual, stays & self.visual
        return text.sum(1), visual.sum(1), stays[:, self.prompt_end :].sum(1)

    def _given(self, where: str, counts: Any) -> tuple[list[int], list[int]]:
        """Counts of text and of visual rows, which must not exceed what is there."""
        if not isinstance(counts, list | tuple) or len(counts) != 2:
            raise TypeError(
                f"{where}: counts: expected those of text and of visual rows, got {shown(counts)}"
            )
        there = (self.text_now, self.visual_now)
        lists = [
            x
            if self._may_be_there_only(x)
            else host_counts(f"{where}: counts", x, len(self.visual))
            for x in counts
        ]
        for what, x, most in zip(KINDS, lists, there, strict=True):
            check_fit(where, what, x, most)
        return lists[0], lists[1]


def _fit(totals: Tensor, capacity: int) -> Fact:
    return Fact(
        totals <= capacity, lambda b: f"{int(totals[b])} rows stay, and capacity is {capacity}"
    )


def _ends(rows: slice, length: int) -> tuple[int, int]:
    """The first of some rows of `length`, and the one behind the last. As `slice.indices`, which
    would have compiled code hold for one length alone."""
    first, last = rows.start or 0, length if rows.stop is None else rows.stop
    return max(first + length, 0) if first < 0 else first, last + length if last < 0 else last


def _both(some: Tensor | None, others: Tensor | None) -> Tensor | None:
    """Where both hold; None: everywhere."""
    if some is None or others is None:
        return others if some is None else some
    return some & others


def behind(past: int, among: Tensor) -> Tensor:
    """bool [B, past + S]: of `past` earlier keys none, and behind them those of `among`."""
    return pad(among, (past, 0)) if past else among
