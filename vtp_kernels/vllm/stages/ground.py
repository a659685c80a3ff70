"""All that the stages take for granted of vLLM 0.32: what they import, and what they know of it.

Each assumption is a docstring or a line here, and a test of tests/vllm_check/stages/test_ground.py.
None of it is promised by vLLM. Nothing else in this folder imports more of vLLM than its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.glm4_moe import Glm4MoeModel
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from .settings import WHERE

__all__ = [
    "PAD_SLOT_ID",
    "AllRanks",
    "AsyncScheduler",
    "Attention",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "CommonAttentionMetadata",
    "DefaultModelState",
    "LogitsProcessor",
    "Scheduler",
    "SingleTypeKVCacheManager",
    "attention_fields",
    "batch_of",
    "cdiv",
    "check_layers",
    "common_for",
    "get_forward_context",
    "init_logger",
    "is_beam",
    "managers_of",
    "override_forward_context",
    "picture_ranges",
    "refuse",
    "register_spec",
    "resolve_block_hashes",
    "subclass_attention_backend",
    "with_metadata",
    "with_rows",
]

# ---- requests ------------------------------------------------------------------------------------


def is_beam(sampling: Any) -> bool:
    """Whether a request is a step of a beam search: vLLM does not say so, but asks for one token,
    not as text, by its candidates, and without a watermark."""
    one = sampling.max_tokens == 1 and not sampling.detokenize
    return one and bool(sampling.logprobs) and sampling.watermarking is False


# ---- engine core --------------------------------------------------------------------------------


def register_spec(spec: type[AttentionSpec], manager: type[SingleTypeKVCacheManager]) -> None:
    """The registry is filled with vLLM's own by the first who asks it, but only while it is empty:
    so these come first. To register twice is no error."""
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(spec, manager)


def attention_fields(spec: AttentionSpec) -> dict[str, Any]:
    """What a layer's spec says of its keys and values, whatever kind of spec it is."""
    return {field.name: getattr(spec, field.name) for field in fields(AttentionSpec) if field.init}


def managers_of(scheduler: Scheduler) -> Sequence[SingleTypeKVCacheManager]:
    """One for each KV cache group. They are told of requests by their ids alone."""
    return scheduler.kv_cache_manager.coordinator.single_type_managers


def picture_ranges(features: Any) -> list[list[tuple[int, int]]]:
    """The first and last places of each picture's tokens, of a request or of what workers are told
    of it."""
    return [feature.mm_position.extract_embeds_range() for feature in features]


def refuse(scheduler: Scheduler, request: Any) -> None:
    """To be called while the request's images are scheduled, which then answers that nothing was.
    It ends with the step as an error: it is how vLLM refuses images that do not fit together."""
    scheduler.encoder_cache_mismatch_reqs.add(request.request_id)


# ---- workers ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """R requests. names : of each. slots : int [R], where workers keep what they know of them.
    computed : int [R], tokens that were read before. lengths : int [R], tokens of this step."""

    names: list[str]
    slots: Any
    slots_there: Tensor
    computed: Any
    lengths: Any


def batch_of(batch: Any) -> Batch:
    """Of model runner V2's InputBatch. Without drafts, numbers on the host are exact. In the
    batches that vLLM makes up to try itself out, no request has a name that was ever added."""
    count = batch.num_reqs
    return Batch(
        batch.req_ids[:count],
        batch.idx_mapping_np[:count],
        batch.idx_mapping[:count],
        batch.num_computed_tokens_np[:count],
        batch.num_scheduled_tokens[:count],
    )


def common_for(common: CommonAttentionMetadata, **changes: Any) -> CommonAttentionMetadata:
    """A group's own: what is worked out once for all groups is not for this one."""
    return replace(
        common, _num_computed_tokens_cache=None, _token_to_req_indices_cache=None, **changes
    )


def with_rows(context: Any, count: int) -> Any:
    """A forward context in which layers run on `count` rows. Attention writes keys to as many slots
    as it is given rows, and nothing else here goes by row."""
    slots = {name: places[:count] for name, places in context.slot_mapping.items()}
    return replace(context, slot_mapping=slots, is_padding=None)


def with_metadata(context: Any, metadata: dict[str, Any]) -> Any:
    """A forward context in which some layers' attention goes by other metadata."""
    return replace(context, attn_metadata=context.attn_metadata | metadata)


def check_layers(decoder: nn.Module) -> None:
    """Raise NotImplementedError unless these are layers as those of Llama: called with positions,
    hidden states and residual, whose `self_attn.rotary_emb` is called with positions, queries and
    keys, and `self_attn.attn` with queries, keys and values in positions, and sees all keys before
    a row."""
    if not isinstance(decoder, LlamaModel | Qwen2Model | Qwen3MoeModel | Glm4MoeModel):
        raise NotImplementedError(
            f"{WHERE}: pruning between layers is for language models of the kinds of Llama, Qwen2, "
            f"Qwen3, GLM-4, and the latter two with experts; this is a {type(decoder).__name__}"
        )
    for layer in decoder.layers:
        attention = layer.self_attn.attn
        odd = {
            "class": type(attention) is not Attention,
            "sliding_window": attention.sliding_window is not None,
            "attn_type": attention.attn_type != AttentionType.DECODER,
            "kv_sharing_target_layer_name": attention.kv_sharing_target_layer_name is not None,
            "sinks": attention.has_sink,
        }
        if any(odd.values()):
            found = ", ".join(name for name, is_odd in odd.items() if is_odd)
            raise NotImplementedError(
                f"{WHERE}: pruning between layers needs plain causal attention in all layers; that "
                f"of {attention.layer_name} is another ({found})"
            )


class AllRanks(NamedTuple):
    """Heads that tensor-parallel ranks share evenly, made one: see
    `vtp_kernels.models.attention.ranks.AllHeads`. What each rank gets is the same to the bit."""

    heads: int
    """Query heads in all."""

    def mean(self, scores: Tensor, query: Tensor) -> Tensor:
        if not self.are_spread(query):
            return scores
        ranks = get_tensor_model_parallel_world_size()
        return tensor_model_parallel_all_reduce(scores.contiguous()) / ranks

    def gather(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if not self.are_spread(query):
            return query, *others
        return tuple(
            tensor_model_parallel_all_gather(states.contiguous(), dim=1)
            for states in (query, *others)
        )

    def are_spread(self, query: Tensor) -> bool:
        return query.shape[1] != self.heads
