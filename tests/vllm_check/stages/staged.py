"""Engines that prune between layers, and a look into their KV cache."""

from types import SimpleNamespace

import asking

OPTIONS = {
    "scheduler_cls": "vtp_kernels.vllm.StagedScheduler",
    "logits_processors": ["vtp_kernels.vllm:StagedRequests"],
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 16,
}


def method_settings(method):
    return {"additional_config": {"vtp": {"method": method}}} | OPTIONS


def llm(method, *model, **settings):
    return asking.llm(*model, **method_settings(method) | settings)


def core(engine):
    return engine.llm_engine.engine_core.engine_core


def watch(engine):
    """What the engine's scheduler gives out from now on: `most` blocks at once, `empty` when none
    is in use, how many times requests were `preempted`, and `requests` in the fullest step."""
    scheduler = core(engine).scheduler
    pool = scheduler.kv_cache_manager.block_pool
    seen = SimpleNamespace(
        most=0, empty=pool.get_num_free_blocks(), preempted=0, requests=0, pool=pool
    )
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def watched(*args, **kwargs):
        output = schedule(*args, **kwargs)
        seen.most = max(seen.most, seen.empty - pool.get_num_free_blocks())
        seen.requests = max(seen.requests, len(output.num_scheduled_tokens))
        return output

    def counted(*args, **kwargs):
        seen.preempted += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = watched, counted
    return seen


def assert_all_free(engine):
    """No block is in use, and nothing is remembered of a request that is gone."""
    engine_core = core(engine)
    scheduler = engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is never given out
    assert not scheduler._losing
    assert not any(manager._losing for manager in scheduler._stage_managers())
