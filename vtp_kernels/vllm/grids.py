"""Families whose images have rows and columns in rotary positions of three dimensions (M-RoPE).

Which tokens of an image stay is known when its tower has run, later than vLLM asks for positions.
But where text is, and where each image begins, does not depend on that. So all rows of a pruned
image get its first position to begin with, and what is to be added to each comes with the rows, in
columns behind what the language model reads; vLLM has that for videos it prunes (model runner V2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from vtp_kernels.models.towers.packed import received_in_segments

from .budget import KEY, Budget
from .choice import similarity_to_whole
from .processing import BudgetInfo, BudgetProcessor
from .seeing import PrunedImages, which_stay

__all__ = ["GridInfo", "GridProcessor", "PrunedGrids"]

GRID = "image_grid_thw"
DIGIT = 256  # up to it bfloat16 has all whole numbers


class GridInfo(BudgetInfo):
    def check_budget(self, budget: Budget) -> None:
        mm = self.mm_config
        for option, found, why in (
            ("video_pruning_rate", mm.video_pruning_rate, "both take the positions over"),
            (
                "mm_encoder_tp_mode",
                mm.mm_encoder_tp_mode == "data" or None,
                "ranks then see images of their own; expected 'weights'",
            ),
        ):
            if found:
                raise NotImplementedError(
                    f"{option}: not together with a budget ({KEY}), for {why}; got {found!r}"
                )


class GridProcessor(BudgetProcessor):
    of_images = GRID  # pixels of all images lie behind each other


class GridModelState(DefaultModelState):
    """vLLM's own, which takes what is added to positions from the rows of images."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if self.rope_state is not None and encoder_cache is not None:
            self.mm_pruner = MultiModalPruner(
                model, _SameDelta(self.rope_state), encoder_cache, self.inputs_embeds_size
            )


class _SameDelta:
    """Positions of a request of which only those of images are written anew: the text behind its
    prompt goes on where it was to from the start."""

    def __init__(self, rope_state: Any) -> None:
        self._rope_state = rope_state
        self.read_prefill_positions = rope_state.read_prefill_positions

    def update_prefill_positions(self, request: int, positions: Tensor, delta: None) -> None:
        kept = int(self._rope_state.prefill_delta.np[request])
        self._rope_state.update_prefill_positions(request, positions, kept)


class PrunedGrids(PrunedImages):
    """In front of a model class of vLLM with a `visual` tower in `blocks`, and M-RoPE."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if not vllm_config.use_v2_model_runner:
            raise NotImplementedError(
                f"{type(self).__name__} needs vLLM's model runner V2, for positions follow from "
                "what stays of an image; set VLLM_USE_V2_MODEL_RUNNER=1, or start without the "
                "plugin"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        mm_config = vllm_config.model_config.multimodal_config
        # Videos that vLLM prunes have its columns; no budget is taken then (GridInfo).
        self.adds_places = not mm_config.is_multimodal_pruning_enabled()
        if self.adds_places:
            # Looked for on models that have a state of their own; others have vLLM's.
            self.get_model_state_cls = lambda: GridModelState

    def embed_multimodal(self, **kwargs: object) -> Any:
        budget = kwargs.pop(KEY, None)
        if budget is None:
            found = super(PrunedImages, self).embed_multimodal(**kwargs)
            return [_with_places(rows, None) for rows in found or ()] if self.adds_places else found
        images = self._parse_and_validate_image_input(**kwargs)
        return self._embed_best(images, Budget.of_numbers(budget.tolist()))

    def _embed_best(self, images: Any, budget: Budget) -> list[Tensor]:
        grids = [Grid(*sizes) for sizes in images[GRID].tolist()]
        with _watching(self.visual.blocks[-1].attn) as seen:
            embedded = self._process_image_input(images)
        scores = self._scores(embedded, grids, seen, budget.score)
        best = []
        for rows, grid, of_image in zip(embedded, grids, scores, strict=True):
            if budget.rows(len(rows)) == len(rows):
                best.append(_with_places(rows, None))
                continue
            stays = which_stay(self._features(rows), of_image, budget)
            places = grid.places(self.visual.spatial_merge_size).to(rows.device)
            best.append(_with_places(rows[stays], places[stays]))
        return best

    def _scores(
        self, embedded: Sequence[Tensor], grids: list[Grid], seen: dict[str, Tensor], score: str
    ) -> Iterable[Tensor | None]:
        """Of each image float32 [R], what its rows are scored by; None where it is themselves."""
        if score == "similarity":
            return [similarity_to_whole(self._features(x)[None], cls=False)[0] for x in embedded]
        if score != "attention":
            return [None] * len(embedded)
        received = _received(self.visual.blocks[-1].attn, grids, seen)
        merged = received.unflatten(0, (-1, self.visual.spatial_merge_size**2)).mean(1)
        return self._in_order(merged, grids).split([len(rows) for rows in embedded])

    def _features(self, rows: Tensor) -> Tensor:
        """What enters the first layer of the language model."""
        return rows

    def _in_order(self, scores: Tensor, grids: list[Grid]) -> Tensor:
        """Scores of rows in the order of the tower, in the order in which it puts them out."""
        return scores

    def get_encoder_cudagraph_config(self) -> Any:
        # Graphs would pass `embed_multimodal` by.
        return replace(super().get_encoder_cudagraph_config(), modalities=[])

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        if not self.adds_places:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        tokens, features, columns = self._unpruned(list(input_tokens), mm_features)
        positions, delta = super().get_mrope_input_positions(tokens, features)
        return positions[:, columns], delta + len(tokens) - len(input_tokens)

    def _unpruned(
        self, tokens: list[int], features: list[Any]
    ) -> tuple[list[int], list[Any], list[int]]:
        """A prompt as if nothing were pruned, and of each of its tokens now the column there; of
        the rows of pruned images the first."""
        whole, moved, columns, done = [], [], [], 0
        for feature in sorted(features, key=lambda x: x.mm_position.offset):
            at, length = feature.mm_position.offset, feature.mm_position.length
            columns += range(len(whole), len(whole) + at - done)
            whole += tokens[done:at]
            done = at + length
            count = length
            if feature.modality == "image":
                grid = Grid(*feature.data[GRID].data.tolist())
                count = grid.tokens(self.config.vision_config.spatial_merge_size)
            start = len(whole)
            columns += [start] * length if count > length else range(start, start + length)
            place = replace(feature.mm_position, offset=start, length=count)
            moved.append(replace(feature, mm_position=place))
            whole += tokens[at:done] if count == length else [tokens[at]] * count
        columns += range(len(whole), len(whole) + len(tokens) - done)
        return whole + tokens[done:], moved, columns

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int | None]:
        if not self.adds_places:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        device = mrope_positions.device
        found = [_without_places(rows) for rows in multimodal_embeddings]
        places = torch.cat([more for _, more in found]).to(device)
        ids = torch.as_tensor(input_ids, device=device)
        config = self.config
        shows = (ids == config.image_token_id) | (ids == config.video_token_id)
        shows[:num_computed_tokens] = False
        columns = shows.nonzero()[: len(places), 0]
        positions = mrope_positions.clone()
        positions[:, columns] += places.T
        return [rows for rows, _ in found], positions, None


class Grid(NamedTuple):
    """Patches of an image."""

    frames: int
    height: int
    width: int

    def tokens(self, side: int) -> int:
        return self.frames * self.height * self.width // side**2

    def places(self, side: int) -> Tensor:
        """int64 [R, 3]: frame, row and column of each token, that shows side x side patches."""
        sizes = (self.frames, self.height // side, self.width // side)
        return torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, 3)


@contextmanager
def _watching(attention: Any) -> Iterator[dict[str, Tensor]]:
    """While images are encoded: what a layer's attention was called with."""
    seen: dict[str, Tensor] = {}

    def called(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update({name: kwargs[name][0] for name in ("query", "key")})

    hook = attention.attn.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _received(attention: Any, grids: list[Grid], seen: dict[str, Tensor]) -> Tensor:
    """float32 [P]: the attention that each patch gets from all of its image, mean over these and
    over the heads of all ranks, or these would keep different tokens."""
    lengths = [grid.height * grid.width for grid in grids for _ in range(grid.frames)]
    scale = attention.hidden_size_per_attention_head**-0.5
    received = received_in_segments(seen["query"], seen["key"], lengths, scale, None)
    if attention.tp_size > 1:
        received = tensor_model_parallel_all_reduce(received.contiguous()) / attention.tp_size
    return received


def _with_places(rows: Tensor, places: Tensor | None) -> Tensor:
    """Behind the rows [R, C] what is added to their positions, int64 [R, 3], in two digits each;
    None: nothing."""
    if places is None:
        return torch.cat((rows, rows.new_zeros(len(rows), 6)), dim=1)
    digits = torch.cat((places // DIGIT, places % DIGIT), dim=1)
    return torch.cat((rows, digits.to(rows.dtype)), dim=1)


def _without_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, C], and what is added to their positions, int64 [R, 3]."""
    high, low = rows[:, -6:].long().chunk(2, dim=1)
    return rows[:, :-6], high * DIGIT + low
