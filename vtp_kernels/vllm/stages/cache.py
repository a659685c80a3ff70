"""Blocks for the rows that stay: what a stage's layers say of themselves, and who gives them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .ground import (
    AttentionSpec,
    SingleTypeKVCacheManager,
    cdiv,
    register_spec,
    resolve_block_hashes,
)

__all__ = ["StageManager", "StageSpec"]


@dataclass(frozen=True, kw_only=True)
class StageSpec(AttentionSpec):
    """Full attention over the rows that a stage has. No FullAttentionSpec: vLLM gives all of these
    one block table."""

    stage: int

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of a prompt without images, which loses nothing."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, specs: dict[str, Any]) -> bool:
        return all(
            isinstance(spec, StageSpec) and spec.stage == self.stage for spec in specs.values()
        )


class StageManager(SingleTypeKVCacheManager):
    """As many blocks as rows stay. Of a prompt that loses rows, only what comes before its first
    image is shared: behind it, which rows are there depends on how the prompt goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losing: dict[str, tuple[int, int]] = {}

    def expect(self, request_id: str, gone: int, shareable: int) -> None:
        """A request will lose `gone` rows once its prompt is read, and its first `shareable` tokens
        are as in any other request."""
        self._losing[request_id] = gone, shareable

    def forget(self, request_id: str) -> None:
        self._losing.pop(request_id, None)

    def _rows(self, request_id: str, tokens: int) -> int:
        return tokens - self._losing.get(request_id, (0, 0))[0]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        rows = self._rows(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, rows, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        rows = self._rows(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, rows, num_tokens_main_model)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        _, shareable = self._losing.get(request.request_id, (0, num_tokens))
        super().cache_blocks(request, min(num_tokens, shareable), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """As many whole blocks from the start as are known, and a multiple of the alignment."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found: Sequence[list[Any]] = tuple([] for _ in kv_cache_group_ids)
        for block_hash in itertools.islice(hashes, max_length // size):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:
                break
            for blocks, block in zip(found, cached, strict=True):
                blocks.append(block)
        length = len(found[0]) * size
        length -= length % alignment_tokens
        for blocks in found:
            del blocks[length // size :]
        return tuple(found), length


register_spec(StageSpec, StageManager)
