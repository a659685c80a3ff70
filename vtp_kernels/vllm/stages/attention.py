"""A stage's layers: how their attention finds the rows that are there."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .accounting import Stage, Step
from .cache import StageSpec
from .ground import (
    PAD_SLOT_ID,
    Attention,
    attention_fields,
    common_for,
    subclass_attention_backend,
)

__all__ = ["ShallowAttention", "Shared", "StageAttention"]


class Shared:
    """Between what prepares a step and what runs it."""

    #: By stage and layers: the builder of their metadata, and what it was given.
    built: dict[tuple[int, tuple[str, ...]], tuple[Any, tuple[Any, ...]]]
    step: Step | None

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, step: Step | None) -> None:
        self.step, self.built = step, {}

    def again(self, stage: int) -> dict[str, Any]:
        """Metadata of a stage's layers, by their names, now that its rows have been counted."""
        return {
            name: metadata
            for (at, names), (builder, given) in self.built.items()
            if at == stage
            for metadata in [builder.build(*given)]
            for name in names
        }


class StageAttention(Attention):
    """vLLM's own, in KV cache groups of its stage."""

    stage: int
    shared: Shared

    @classmethod
    def make(cls, attention: Attention, stage: int, shared: Shared) -> None:
        """One that has been built already: vLLM has noted it, and asks later what it needs."""
        attention.__class__ = cls
        attention.stage, attention.shared = stage, shared

    def get_attn_backend(self) -> Any:
        return stage_backend(super().get_attn_backend())

    def get_kv_cache_spec(self, vllm_config: Any) -> StageSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        return StageSpec(**attention_fields(spec), stage=self.stage)


class ShallowAttention(Attention):
    """vLLM's own of layers before the first stage, in blocks `times` as long. Then vLLM puts one of
    these beside `times` layers of a stage, where blocks are outermost, and each stage is one group;
    else it cuts all groups to as many layers, which before FastV's layer 2 are two."""

    times: int

    @classmethod
    def make(cls, attention: Attention, times: int) -> None:
        attention.__class__, attention.times = cls, times

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, block_size=spec.block_size * self.times)


@functools.cache
def stage_backend(backend: Any) -> Any:
    """A backend whose metadata is that of a stage's rows."""
    builder = backend.get_builder_cls()
    built = type("StageBuilder", (_Building, builder), {})
    return subclass_attention_backend("Stage", backend, built)


class _Building:
    """In front of a backend's metadata builder. Rows that stay lie one behind the other in the
    group's blocks, in their order and with their own positions in their keys: causal attention has
    to know but their number, and slots follow from that."""

    def __init__(
        self, spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(spec, layer_names, vllm_config, device, **kwargs)
        layers = vllm_config.compilation_config.static_forward_context
        self.shared: Shared = layers[layer_names[0]].shared
        self.stage = spec.stage
        # Where graphs find it again.
        self.lengths = torch.zeros(
            vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        given = common_prefix_len, common_attn_metadata, fast_build
        self.shared.built[self.stage, tuple(self.layer_names)] = self, given
        common = common_attn_metadata
        lengths = self.lengths[: len(common.seq_lens)]
        lengths.copy_(common.seq_lens)
        changes: dict[str, Any] = {"seq_lens": lengths}
        stage = None if self.shared.step is None else self.shared.step.stages[self.stage]
        if stage is not None:
            count = len(stage.gone)
            lengths[:count] -= stage.gone
            changes |= self._counts(common, stage)
        own = common_for(common, **changes)
        if stage is not None:
            self._place(own, stage, common.slot_mapping)
        return super().build(common_prefix_len, own, fast_build)

    def _counts(self, common: Any, stage: Stage) -> dict[str, Any]:
        """What the host is told."""
        changes: dict[str, Any] = {}
        most = common.seq_lens_cpu_upper_bound
        if most is not None:
            most = most.clone()
            most[: len(stage.gone_host)] -= stage.gone_host
            changes["seq_lens_cpu_upper_bound"] = most
        if stage.starts is not None:
            changes |= {
                "query_start_loc": stage.starts,
                "query_start_loc_cpu": stage.starts_host,
                "num_actual_tokens": int(stage.starts_host[-1]),
                "max_query_len": int(stage.starts_host.diff().max()),
                "positions": None,
            }
        return changes

    def _place(self, own: Any, stage: Stage, slots: Tensor) -> None:
        """Slots, in place: what the layers are given is this very tensor."""
        count = int(own.query_start_loc_cpu[-1])
        request, place = stage.places(own.query_start_loc, own.seq_lens, count)
        size = self.kv_cache_spec.block_size
        blocks = own.block_table_tensor[request, place // size].long()
        slots[:count] = blocks * size + place % size
        slots[count:] = PAD_SLOT_ID
