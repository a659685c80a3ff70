"""The model's side of it. What needs vLLM's inner parts is imported when a method is asked for: all
else of the plugin does without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .settings import Settings, check_engine

if TYPE_CHECKING:
    from .passage import Passage

__all__ = ["Staged"]


class Staged:
    """In front of a model class of vLLM that has a `language_model`. Without a method it is as if
    it were not there."""

    passage: Passage | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = Settings.of(vllm_config)
        if settings is not None:
            from vllm import __version__, envs

            check_engine(vllm_config, __version__, envs.VLLM_KV_CACHE_LAYOUT)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if settings is not None:
            from .passage import Passage
            from .state import staged

            self.passage = Passage(self.language_model.model, settings)
            # Looked for on models that have a state of their own; others have vLLM's.
            own = getattr(type(self), "get_model_state_cls", None)
            state = staged(None if own is None else own())
            self.get_model_state_cls = lambda: state

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if self.passage is not None and self.passage.is_asked_for():
            return self._by_stages(positions, inputs_embeds)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _by_stages(self, positions: Tensor, embeddings: Tensor) -> Tensor:
        return self.passage(positions, embeddings)
