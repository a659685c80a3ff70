"""vLLM's side of the processor: the settings, and as many placeholders as tokens will stay.

vLLM fixes how many rows an image takes before the vision tower has seen it. The mixins stand in
front of vLLM's own classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails

from .budget import KEY, Budget, without_budget

__all__ = ["BudgetInfo", "BudgetProcessor"]


class BudgetInfo:
    """In front of a `ProcessingInfo` of vLLM.

    Attributes
    ----------
    budget : Budget or None
        What the engine was started with.
    """

    def __init__(self, ctx: Any) -> None:
        self.mm_config = ctx.model_config.get_multimodal_config()
        super().__init__(replace(ctx, model_config=_WithoutBudget(ctx.model_config)))
        try:
            self.budget = Budget.of(self.mm_config.mm_processor_kwargs)
            self._check(self.budget)
        except ValueError as error:
            # vLLM takes a ValueError here for a model that reads no images, and goes on without.
            raise RuntimeError(f"mm_processor_kwargs: {error}") from error

    @cached_property
    def most(self) -> int:
        """Rows that an image takes at most, unpruned."""
        return self.get_max_image_tokens()

    def _check(self, budget: Budget | None) -> None:
        if budget is not None:
            self.check_budget(budget)
            budget.check_most(self.most)

    def check_budget(self, budget: Budget) -> None:
        """Raise NotImplementedError or ValueError for what this model cannot be pruned by."""
        raise NotImplementedError

    def budget_for(self, mm_processor_kwargs: Mapping[str, Any]) -> Budget | None:
        """What holds for a request. vLLM set memory aside for images of the engine's budget, so a
        request may lower it, and not lift it."""
        budget = Budget.of(self.mm_config.merge_mm_processor_kwargs(mm_processor_kwargs))
        self._check(budget)
        if self.budget is not None:
            limit, asked = (x.rows(self.most) if x else self.most for x in (self.budget, budget))
            if asked > limit:
                raise ValueError(
                    f"{KEY}.keep: a request may not ask for more than the engine's {limit} of the "
                    f"{self.most} tokens of the largest image, got "
                    f"{asked if budget else 'all tokens'}"
                )
        return budget


class _WithoutBudget:
    """A model's configuration in vLLM as ever, but that transformers is not told the settings."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self.multimodal_config = copy(model_config.get_multimodal_config())
        self.multimodal_config.mm_processor_kwargs = without_budget(
            self.multimodal_config.mm_processor_kwargs
        )

    def get_multimodal_config(self) -> Any:
        return self.multimodal_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_config, name)


class BudgetProcessor:
    """In front of a `MultiModalProcessor` of vLLM."""

    info: BudgetInfo
    #: What comes of images, and has as many entries.
    of_images = "pixel_values"

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # vLLM leaves out what the engine was started with: engines that share a cache would take
        # each other's images.
        hashes = super()._get_mm_hashes(inputs)
        budget = self.info.budget_for(inputs.hf_processor_mm_kwargs)
        if budget is None or "image" not in hashes:
            return hashes
        algorithm = self.info.mm_config.mm_hasher_algorithm
        settings = json.dumps(budget.to_dict(), sort_keys=True)  # tells 1 from 1.0
        return hashes | {
            "image": [
                MultiModalHasher.hash_kwargs(algorithm, image=key, **{KEY: settings})
                for key in hashes["image"]
            ]
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        budget = self.info.budget_for(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, without_budget(hf_kwargs))
        if budget is not None and self.of_images in data:
            data[KEY] = torch.tensor(budget.to_numbers(), dtype=torch.float64)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        known = without_budget(hf_processor_mm_kwargs)
        config = dict(super()._get_mm_fields_config(hf_inputs, known))
        if KEY in hf_inputs:
            # Shared: vLLM encodes images of different budgets one budget after the other.
            count = len(hf_inputs[self.of_images])
            config[KEY] = MultiModalFieldConfig.shared("image", count, keep_on_cpu=True)
        return config

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        known = without_budget(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, known, out_mm_kwargs)
        budget = self.info.budget_for(hf_processor_mm_kwargs)
        if budget is None or isinstance(mm_items.get("image"), ImageEmbeddingItems):
            return updates
        return [_cut(x, budget) if x.modality == "image" else x for x in updates]


def _cut(update: Any, budget: Budget) -> PromptUpdate:
    """An image's placeholders, as many as the budget leaves; what stands around them stays."""
    whole = update.replacement

    def replacement(item: int) -> Any:
        placeholders = whole(item)
        if not isinstance(placeholders, PromptUpdateDetails):
            return placeholders[: budget.rows(len(placeholders))]
        tokens = placeholders.full
        shows = torch.ones(len(tokens), dtype=torch.bool)
        if placeholders.is_embed is not None:
            shows = placeholders.is_embed(tokens)
        stays = ~shows | (shows.cumsum(0) <= budget.rows(int(shows.sum())))
        return replace(
            placeholders,
            full=[token for token, stay in zip(tokens, stays.tolist(), strict=True) if stay],
        )

    return replace(update, replacement=replacement)
