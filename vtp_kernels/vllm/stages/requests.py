"""What a request may not ask for beside a method between the layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import __version__, envs

from .ground import LogitsProcessor, is_beam
from .settings import Settings, check_engine

__all__ = ["StagedRequests", "why_not"]


class StagedRequests(LogitsProcessor):
    """Changes no logits. vLLM shows the parameters of every request to such a class as it comes in,
    and what is raised there is the client's error. It is shown parameters alone: text-only prompts
    may not ask for these either."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if Settings.of(vllm_config) is not None:
            check_engine(vllm_config, __version__, envs.VLLM_KV_CACHE_LAYOUT)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if reason := why_not(sampling_params):
            raise ValueError(reason)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return logits


def why_not(sampling: Any) -> str | None:
    """Why no request with such parameters can be served; None if it can. The first word is the
    option's name."""
    for option in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(sampling, option) is not None:
            return (
                f"{option}: expected None, for rows of images leave between the layers and have no "
                "logits (echo asks for them where logprobs are wanted)"
            )
    if is_beam(sampling):
        return (
            "use_beam_search: expected False, for vLLM reads every step of a beam as a prompt of "
            "its own, and what stays of an image would change with every word of the answer"
        )
    return None
