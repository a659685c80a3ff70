"""The scheduler of an engine that prunes between layers."""

from __future__ import annotations

from typing import Any

from .accounting import Prompt
from .cache import StageManager
from .ground import (
    AsyncScheduler,
    Scheduler,
    init_logger,
    managers_of,
    picture_ranges,
    refuse,
)
from .requests import why_not
from .settings import WHERE, Settings

__all__ = ["StagedScheduler"]

logger = init_logger(__name__)


class StagedScheduler(Scheduler):
    """vLLM's own, which tells the KV cache how many rows each request will lose, and schedules a
    prompt that loses some whole or not at all."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> StagedScheduler:
        if cls is StagedScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = StagedAsyncScheduler
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.settings = Settings.of(vllm_config)
        self._losing: set[str] = set()
        if self.settings is not None and not self._stage_managers():
            raise NotImplementedError(
                f"{WHERE}: the model is not one of this plugin's; expected one that it "
                "knows, and VLLM_PLUGINS=vtp_kernels"
            )

    def add_request(self, request: Any) -> None:
        if self.settings is not None and request.mm_features:
            self._expect(request)
        super().add_request(request)

    def _expect(self, request: Any) -> None:
        prompt = Prompt.of(picture_ranges(request.mm_features), request.num_prompt_tokens)
        if not self.settings.changes(prompt.pictures):
            return
        gone = [len(prompt.visual) - most for most in self.settings.most(prompt.pictures)]
        # Where rows are not counted, text may leave as well, and before the first image.
        shareable = int(prompt.visual[0]) if self.settings.counted else 0
        self._losing.add(request.request_id)
        for manager in self._stage_managers():
            manager.expect(request.request_id, gone[manager.kv_cache_spec.stage], shareable)
        # What has been read before would be missing where the method looks at attention.
        request.skip_reading_prefix_cache = True

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        """vLLM reads a prompt up to the first image that its encoder has no room for. One that is
        to lose rows waits for the next step instead."""
        nothing = [], 0, encoder_compute_budget, [], []
        loses = request.request_id in self._losing
        if loses and (reason := _why_not(request)):
            logger.error("request %s cannot be served: %s", request.request_id, reason)
            refuse(self, request)
            return nothing
        found = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        return nothing if loses and found[1] < num_new_tokens else found

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)
        self._losing.discard(request.request_id)
        for manager in self._stage_managers():
            manager.forget(request.request_id)

    def _stage_managers(self) -> list[StageManager]:
        return [manager for manager in managers_of(self) if isinstance(manager, StageManager)]


class StagedAsyncScheduler(StagedScheduler, AsyncScheduler):
    """The same, one step ahead of the workers."""


def _why_not(request: Any) -> str | None:
    """Why a request that loses rows cannot be served; None if it can. Parameters were looked at
    before, but for those of a client that hands over requests that are ready."""
    if request.resumable:
        return "resumable: a prompt with images that lose rows cannot go on later"
    return None if request.sampling_params is None else why_not(request.sampling_params)
