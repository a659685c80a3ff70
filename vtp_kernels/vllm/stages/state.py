"""What workers know of requests besides what vLLM does (model runner V2)."""

from __future__ import annotations

from typing import Any

from .accounting import Accounts, Prompt
from .ground import DefaultModelState, batch_of, picture_ranges

__all__ = ["staged"]


def staged(state: type | None) -> type:
    """A model's own kind of state, None if that is vLLM's, which also tells the attention what
    leaves in a step."""
    own = DefaultModelState if state is None else state
    return type(f"Staged{own.__name__}", (WithStages, own), {})


class WithStages:
    """In front of such a kind."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.passage = model.passage
        self.passage.settings.method.prepare(device, self.dtype)
        self.accounts = Accounts(self.passage.settings, self.max_num_reqs, device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        ranges = picture_ranges(new_req_data.mm_features)
        self.accounts.add(
            new_req_data.req_id, req_index, Prompt.of(ranges, new_req_data.prompt_len)
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.accounts.remove(req_id)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.passage.shared.begin(self.accounts.step(*batch_of(input_batch)))
        return super().prepare_attn(input_batch, *args, **kwargs)
