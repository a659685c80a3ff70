"""What the stages take for granted of vLLM, one by one: the next vLLM breaks a test here, and not a
server."""

import inspect
from dataclasses import fields
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run by `make vllm-check`")

import torch
import vllm
from vllm.config import SchedulerConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_groups,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

import vtp_kernels as vtp
from vtp_kernels.vllm.stages import ground
from vtp_kernels.vllm.stages.attention import ShallowAttention, StageAttention, stage_backend
from vtp_kernels.vllm.stages.cache import StageManager, StageSpec
from vtp_kernels.vllm.stages.scheduler import StagedAsyncScheduler, StagedScheduler
from vtp_kernels.vllm.stages.settings import Settings
from vtp_kernels.vllm.stages.state import StagedModelState

SIZES = {"block_size": 32, "num_kv_heads": 4, "head_size": 64, "dtype": torch.float16}


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Scheduler.add_request, "self request"),
        (Scheduler._free_blocks, "self request"),
        (
            Scheduler._try_schedule_encoder_inputs,
            "self request num_computed_tokens num_new_tokens encoder_compute_budget "
            "shift_computed_tokens",
        ),
        (
            SingleTypeKVCacheManager.get_num_blocks_to_allocate,
            "self request_id num_tokens new_computed_blocks total_computed_tokens "
            "num_local_computed_tokens num_tokens_main_model apply_admission_cap prefill_end",
        ),
        (
            SingleTypeKVCacheManager.allocate_new_blocks,
            "self request_id num_tokens num_tokens_main_model",
        ),
        (
            SingleTypeKVCacheManager.cache_blocks,
            "self request num_tokens retention_interval replay_boundaries",
        ),
        (
            FullAttentionManager.find_longest_cache_hit,
            "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec "
            "drop_eagle_block alignment_tokens dcp_world_size pcp_world_size",
        ),
        (ground.Attention.get_kv_cache_spec, "self vllm_config"),
        (ground.Attention.get_attn_backend, "self"),
        (
            ground.AttentionMetadataBuilder.build,
            "self common_prefix_len common_attn_metadata fast_build",
        ),
        (ground.LogitsProcessor.__init__, "self vllm_config req_states"),
        (ground.LogitsProcessor.validate_params, "sampling_params"),
        (ground.LogitsProcessor.add_request, "self req_idx sampling_params"),
        (ground.LogitsProcessor.apply, "self logits ctx"),
        (DefaultModelState.__init__, "self vllm_config model encoder_cache device"),
        (DefaultModelState.add_request, "self req_index new_req_data"),
        (DefaultModelState.remove_request, "self req_id"),
        (
            DefaultModelState.prepare_attn,
            "self input_batch cudagraph_mode block_tables slot_mappings attn_groups "
            "kv_cache_config for_capture ubatch_idx model_specific_attn_metadata",
        ),
        (LlamaDecoderLayer.forward, "self positions hidden_states residual"),
        (Qwen2DecoderLayer.forward, "self positions hidden_states residual"),
        *[
            (
                model.forward,
                "self input_ids positions intermediate_tensors inputs_embeds kwargs",
            )
            for model in (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
        ],
    ],
)
def test_what_is_overridden_or_called_has_these_parameters(function, expected):
    assert parameters(function) == expected.split()


def test_nothing_else_of_a_manager_counts_rows_of_a_request():
    """Methods that are told how many tokens a request has, and are not overridden, are those that
    a stage has no use for: it drops nothing by itself, and loads nothing from elsewhere."""
    told = {
        name
        for name, method in vars(SingleTypeKVCacheManager).items()
        if inspect.isfunction(method)
        and any("num" in parameter and "tokens" in parameter for parameter in parameters(method))
    }
    overridden = told & vars(StageManager).keys()
    assert told - overridden == {
        "_has_partial_local_hit",
        "add_local_computed_blocks",
        "allocate_external_computed_blocks",
        "finalize_partial_tail_offload",
        "get_num_skipped_tokens",
        "remove_skipped_blocks",
    }


def test_a_stage_has_groups_and_managers_of_its_own():
    """vLLM puts no layer of one stage with those of another, or of none."""
    specs = {f"{n}": FullAttentionSpec(**SIZES) for n in range(2)}
    specs |= {f"{n}": StageSpec(**SIZES, stage=(n - 2) // 2) for n in range(2, 8)}
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)
        ),
        speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
    )
    groups = get_kv_cache_groups(config, specs)
    assert [group.layer_names for group in groups] == [
        ["0", "1"],
        ["2", "3"],
        ["4", "5"],
        ["6", "7"],
    ]
    assert [getattr(group.kv_cache_spec, "stage", None) for group in groups] == [None, 0, 1, 2]
    (one,) = get_kv_cache_groups(config, {n: StageSpec(**SIZES, stage=0) for n in "abc"})
    assert one.kv_cache_spec.stage == 0
    find = KVCacheSpecRegistry.get_manager_class
    assert find(groups[1].kv_cache_spec) is StageManager
    assert find(groups[0].kv_cache_spec) is FullAttentionManager  # is still registered


def planned(times, layout):
    """vLLM's groups for FastV at layer 2 of 32, the first blocks `times` as long as the others."""
    layer = ShallowAttention.__new__(ShallowAttention)
    layer.__dict__["times"] = times
    with pytest.MonkeyPatch.context() as patched:
        spec = FullAttentionSpec(**SIZES | {"block_size": 16})
        patched.setattr(ground.Attention, "get_kv_cache_spec", lambda self, config: spec)
        shallow = layer.get_kv_cache_spec(None)
    specs = {f"{n}": shallow for n in range(2)}
    specs |= {f"{n}": StageSpec(**SIZES | {"block_size": 16}, stage=0) for n in range(2, 32)}
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
    )
    return get_kv_cache_groups(config, specs)


def test_a_packed_cache_has_one_group_for_each_stage():
    packed, unpacked = planned(15, KVCacheLayout.BLNHC), planned(1, KVCacheLayout.LBNHC)
    assert [len(group.layer_names) for group in packed] == [2, 30]
    assert [len(group.layer_names) for group in unpacked] == [2] * 16
    # Blocks of both hold as many bytes.
    assert len({group.kv_cache_spec.page_size_bytes for group in packed}) == 1
    config = KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=packed)
    shallow, stage = generate_scheduler_kv_cache_config([config]).kv_cache_groups
    assert (shallow.kv_cache_spec.block_size, stage.kv_cache_spec.block_size) == (240, 16)
    find = KVCacheSpecRegistry.get_manager_class
    assert find(shallow.kv_cache_spec) is FullAttentionManager
    assert find(stage.kv_cache_spec) is StageManager and stage.kv_cache_spec.stage == 0


def test_a_stage_keeps_what_a_layer_says_of_its_keys():
    spec = FullAttentionSpec(**SIZES, page_size_padded=2**20)
    own = StageSpec(**ground.attention_fields(spec), stage=3)
    assert own.page_size_bytes == spec.page_size_bytes == 2**20
    assert own.copy_with_new_block_size(16).stage == 3
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1000),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    assert own.max_memory_usage_bytes(config) == spec.max_memory_usage_bytes(config)


def test_the_scheduler_is_found_and_is_of_the_kind_that_is_asked_for():
    name = "vtp_kernels.vllm.StagedScheduler"
    config = SchedulerConfig.default_factory(scheduler_cls=name)
    assert config.get_scheduler_cls() is StagedScheduler
    for scheduling, kind in ((False, StagedScheduler), (True, StagedAsyncScheduler)):
        config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=scheduling))
        made = StagedScheduler.__new__(StagedScheduler, vllm_config=config)
        assert type(made) is kind and isinstance(made, AsyncScheduler) == scheduling
    order = StagedAsyncScheduler.__mro__
    assert order.index(StagedScheduler) < order.index(AsyncScheduler) < order.index(Scheduler)
    assert "self.encoder_cache_mismatch_reqs" in inspect.getsource(Scheduler.update_from_output)


def test_a_model_of_others_is_refused_and_not_served_dense(monkeypatch):
    """What vLLM is told of a method, it does not look at itself."""

    def init(scheduler, vllm_config):
        coordinator = SimpleNamespace(single_type_managers=())
        scheduler.kv_cache_manager = SimpleNamespace(coordinator=coordinator)

    monkeypatch.setattr(Scheduler, "__init__", init)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=False))
    monkeypatch.setattr(Settings, "of", lambda vllm_config: None)
    StagedScheduler(vllm_config=config)
    monkeypatch.setattr(Settings, "of", lambda vllm_config: Settings(vtp.FastV(), (2,), 8))
    with pytest.raises(NotImplementedError, match="and VLLM_PLUGINS=vtp_kernels"):
        StagedScheduler(vllm_config=config)


def test_what_is_worked_out_for_all_groups_is_in_known_fields():
    private = {field.name for field in fields(CommonAttentionMetadata) if field.name[0] == "_"}
    assert private == {"_num_computed_tokens_cache", "_token_to_req_indices_cache"}
    # By row of the step, and so cut, replaced or left out where rows leave.
    names = {field.name for field in fields(CommonAttentionMetadata)}
    assert names >= {"query_start_loc", "query_start_loc_cpu", "seq_lens", "positions"}
    assert names >= {"num_actual_tokens", "max_query_len", "seq_lens_cpu_upper_bound"}


def test_a_forward_context_goes_by_row_in_known_fields():
    assert {field.name for field in fields(ForwardContext)} == {
        *("no_compile_layers", "attn_metadata", "slot_mapping", "dp_metadata"),
        *("cudagraph_runtime_mode", "batch_descriptor", "ubatch_slices", "is_padding"),
        *("skip_compiled", "all_moe_layers", "moe_layer_index", "additional_kwargs"),
    }


def test_a_batch_tells_who_is_in_it():
    names = {field.name for field in fields(InputBatch)}
    assert names >= {
        *("req_ids", "num_reqs", "idx_mapping", "idx_mapping_np"),
        *("num_computed_tokens_np", "num_scheduled_tokens"),
    }


def test_a_model_names_its_state():
    model = SimpleNamespace(get_model_state_cls=lambda: StagedModelState)
    assert resolve_model_state_cls(None, model) is StagedModelState
    assert not hasattr(LlavaForConditionalGeneration, "get_model_state_cls")


def test_places_of_a_picture_are_first_and_last():
    embeds = torch.tensor([True, True, False, True])
    feature = SimpleNamespace(mm_position=PlaceholderRange(5, 4, embeds))
    assert [list(map(tuple, some)) for some in ground.picture_ranges([feature])] == [
        [(5, 6), (8, 8)]
    ]


def test_a_backend_is_subclassed_by_its_builder():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    backend = stage_backend(CPUAttentionBackend)
    assert (
        issubclass(backend, CPUAttentionBackend) and stage_backend(CPUAttentionBackend) is backend
    )
    assert issubclass(backend.get_builder_cls(), CPUAttentionBackend.get_builder_cls())
    assert issubclass(StageAttention, ground.Attention)


@pytest.mark.parametrize("attention", [LlamaAttention, Qwen2Attention])
def test_attention_is_called_with_queries_keys_and_values_in_positions(attention):
    source = inspect.getsource(attention.forward)
    assert source.index("self.rotary_emb(positions, q, k)") < source.index("self.attn(q, k, v)")
    source = inspect.getsource(attention.__init__)
    for name in ("num_heads", "num_kv_heads", "head_dim", "scaling", "total_num_heads"):
        assert f"self.{name} =" in source


def test_it_is_the_vllm_that_this_was_written_for():
    assert vllm.__version__.startswith("0.32.")
