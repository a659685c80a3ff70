"""Qwen-VL and those like it in vLLM: images of any size, one behind the other in the tower, and
M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.utils import copy_mm_embedding_modality, get_mm_features_in_window
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from vtp_kernels.contract.counts import moved
from vtp_kernels.models.towers.packed import received_in_segments

from .budget import KEY, Budget
from .checks import check_grids, check_grids_engine
from .choice import best_rows, similarity_to_whole, unlike_rows
from .processing import BudgetInfo, BudgetProcessor
from .seeing import OutsideGraphs, PrunedImages, mean_over_ranks
from .unpruned import COLUMNS, Unpruned, is_pruned, of_columns, to_columns

__all__ = ["GridsBudgetInfo", "GridsBudgetProcessor", "PrunedGrids"]


class GridsBudgetInfo(BudgetInfo):
    def check_budget(self, budget: Budget) -> None:
        check_grids(budget, self.get_hf_config(), self.mm_config)


class GridsBudgetProcessor(BudgetProcessor):
    of_images = "image_grid_thw"

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if "pixel_values" not in data:
            data.pop(KEY, None)  # embeddings have grids as well, and stay as they are
        return data


class Restored(MultiModalPruner):
    """Gives the rows of images that have a budget the positions that they have unpruned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prompts: dict[str, tuple[Tensor, dict[int, int]]] = {}

    def add(self, request: str, tokens: list[int], features: list[Any]) -> None:
        self.remove(request)
        if any(map(is_pruned, features)):
            unpruned, positions, _ = self.model.unpruned(tokens, features)
            self.prompts[request] = positions, unpruned.begins

    def remove(self, request: str) -> None:
        self.prompts.pop(request, None)

    def strip(self, mm_embeds: list[Tensor]) -> list[Tensor]:
        return [
            copy_mm_embedding_modality(rows, rows[:, : self.model.visual.out_hidden_size])
            for rows in mm_embeds
        ]

    def recompute(self, mm_embeds: list[Tensor], input_batch: Any, req_states: Any) -> list[Tensor]:
        rest, found = iter(mm_embeds), []
        slots = input_batch.idx_mapping_np.tolist()
        begins = input_batch.num_computed_prefill_tokens_np.tolist()
        counts = input_batch.num_scheduled_tokens.tolist()
        for request, slot, begin, count in zip(
            input_batch.req_ids, slots, begins, counts, strict=True
        ):
            for feature, first, last in self._in_window(request, begin, begin + count):
                rows = next(rest)
                if is_pruned(feature):
                    self._place(request, slot, feature, first, last, rows[:, -COLUMNS:])
                    rows = copy_mm_embedding_modality(rows, rows[:, :-COLUMNS])
                found.append(rows)
        assert len(found) == len(mm_embeds)
        return found

    def _in_window(self, request: str, begin: int, end: int) -> Iterator[tuple[Any, int, int]]:
        """The items that a step reads rows of, in the order that vLLM gathers them, and which
        of their tokens it reads."""
        features = self.encoder_cache.mm_features[request]
        lowest, highest = get_mm_features_in_window(features, start=begin, end=end)
        for feature in features[lowest:highest]:
            where = feature.mm_position
            first = max(begin - where.offset, 0)
            last = min(end - where.offset, where.length)
            some, others = where.get_embeds_indices_in_range(first, last)
            if some != others:
                yield feature, first, last

    def _place(
        self, request: str, slot: int, feature: Any, first: int, last: int, columns: Tensor
    ) -> None:
        positions, begins = self.prompts[request]
        offset = feature.mm_position.offset
        places = begins[offset] + of_columns(columns)
        prompt = self.rope_state.read_prefill_positions(slot, offset + last)
        prompt[:, offset + first :] = moved(positions, places.device)[:, places].to(prompt)


class RestoredState(DefaultModelState):
    """vLLM's own, with positions as of whole images. With EVS it keeps vLLM's pruner; budgets are
    refused then."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.restored = None
        if self.mm_pruner is None and encoder_cache is not None:
            self.restored = self.mm_pruner = Restored(
                model, self.rope_state, encoder_cache, self.inputs_embeds_size
            )

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        if self.restored is not None:
            new = new_req_data
            self.restored.add(new.req_id, new.prefill_token_ids, new.mm_features)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        if self.restored is not None:
            self.restored.remove(req_id)


class PrunedGrids(OutsideGraphs, PrunedImages):
    """In front of a model class of vLLM whose tower is `visual`. A row shows a square of patches,
    and has the mean of their scores."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_grids_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def get_model_state_cls() -> type:
        return RestoredState

    def embed_multimodal(self, **kwargs: object) -> Any:
        if kwargs.get(KEY) is None:  # vLLM's own course; flat embeddings, too, are its affair
            return super(PrunedImages, self).embed_multimodal(**kwargs)
        return super().embed_multimodal(**kwargs)

    # ---- which rows stay ----------------------------------------------------------------------

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        grids = images["image_grid_thw"].tolist()
        if budget.score == "attention":
            with self._watching() as called_with:
                rows = self._process_image_input(images)
            received = self._received(called_with, grids)
        else:
            rows = self._process_image_input(images)
            received = [None] * len(rows)
        return tuple(
            self._best(image, scores, budget) for image, scores in zip(rows, received, strict=True)
        )

    def _best(self, rows: Tensor, scores: Tensor | None, budget: Budget) -> Tensor:
        keep, shown = budget.rows(len(rows)), self._shown(rows)
        if budget.score == "divprune":
            chosen = unlike_rows(shown, keep)
        elif scores is None:
            chosen = best_rows(similarity_to_whole(shown[None], cls=False)[0], keep)
        else:
            chosen = best_rows(scores, keep)
        return torch.cat((rows[chosen], to_columns(chosen, rows)), dim=1)

    def _shown(self, rows: Tensor) -> Tensor:
        """Of rows as the tower puts them out, what the language model reads before its layers."""
        return rows

    @contextmanager
    def _watching(self) -> Iterator[dict[str, Tensor]]:
        """What the tower's last attention is called with: queries and keys of this rank's heads."""
        found: dict[str, Tensor] = {}
        hook = self.visual.blocks[-1].attn.attn.register_forward_pre_hook(
            lambda module, args, kwargs: found.update(kwargs), with_kwargs=True
        )
        try:
            yield found
        finally:
            hook.remove()

    def _received(self, called_with: dict[str, Tensor], grids: list[list[int]]) -> Any:
        """float32 [N] for each image."""
        attention, square = self.visual.blocks[-1].attn, self.visual.spatial_merge_size**2
        query, key = (called_with[name].flatten(0, 1) for name in ("query", "key"))
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        scores = received_in_segments(query, key, lengths, attention.attn.scale, None)
        scores = mean_over_ranks(scores, attention.tp_size)
        scores = self._in_order(scores.unflatten(0, (-1, square)).mean(1), grids)
        return scores.split([t * h * w // square for t, h, w in grids])

    def _in_order(self, scores: Tensor, grids: list[list[int]]) -> Tensor:
        """Scores float32 [R] of all squares in the order of rows."""
        return scores

    # ---- where they were ----------------------------------------------------------------------

    def unpruned(self, tokens: list[int], features: list[Any]) -> tuple[Unpruned, Tensor, int]:
        """The prompt as it would be, its positions int64 [3, L], and by how much these are behind
        the tokens when it is answered."""
        found = Unpruned.of(tokens, features, self.config.vision_config.spatial_merge_size)
        positions, delta = super().get_mrope_input_positions(found.tokens, found.features)
        return found, positions, delta + len(found.tokens) - len(tokens)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        """What follows images is where it is in the whole prompt; the rows of these are placed
        when it is known which of them stay."""
        if not any(map(is_pruned, mm_features)):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        found, positions, delta = self.unpruned(input_tokens, mm_features)
        return positions[:, found.column], delta
