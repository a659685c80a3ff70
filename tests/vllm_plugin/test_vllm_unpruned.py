"""Where what stays was in the whole prompt, against prompts put together one by one. No vLLM
needed."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vtp_kernels.vllm.budget import KEY, Budget
from vtp_kernels.vllm.checks import check_grids, check_grids_engine
from vtp_kernels.vllm.unpruned import Unpruned, is_pruned, of_columns, to_columns


@dataclass(frozen=True)
class Range:
    offset: int
    length: int


@dataclass(frozen=True)
class Feature:
    modality: str
    data: Any
    mm_position: Range


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_survive_the_dtype_of_rows(dtype):
    places = torch.tensor([0, 1, 127, 128, 255, 257, 16_383, 16_384, 2_097_151])
    columns = to_columns(places, torch.empty(0, dtype=dtype))
    assert columns.dtype == dtype and torch.equal(of_columns(columns), places)


def new_prompt(draw):
    """Tokens and items of a pruned prompt and of the whole one, and for each token that is left
    where it is there."""
    tokens, whole, features, begins, column = [], [], [], {}, []

    def text():
        words = draw.integers(0, 90, draw.integer(0, 4)).tolist()
        column.extend(range(len(whole), len(whole) + len(words)))
        tokens.extend(words)
        whole.extend(words)

    text()
    for _ in range(draw.integer(1, 5)):
        modality = "video" if draw.integer(0, 3) == 0 else "image"
        h, w = draw.integer(1, 5), draw.integer(1, 5)
        rows = h * w
        budgeted = modality == "image" and draw.integer(0, 3) > 0
        keep = draw.integer(1, rows + 1) if budgeted else rows
        grid = SimpleNamespace(data=torch.tensor([1, 2 * h, 2 * w]))
        data = {f"{modality}_grid_thw": grid} | ({KEY: None} if budgeted else {})
        begins[len(tokens)] = len(whole)
        features.append((modality, data, Range(len(tokens), keep), Range(len(whole), rows)))
        column.extend(range(len(whole), len(whole) + keep))
        tokens.extend([99] * keep)
        whole.extend([99] * rows)
        text()
    return tokens, whole, features, begins, column


def test_the_whole_prompt_is_found_again(draw):
    for _ in range(40):
        tokens, whole, made, begins, column = new_prompt(draw)
        features = [Feature(modality, data, here) for modality, data, here, _ in made]
        found = Unpruned.of(tokens, features[::-1], 2)
        assert found.tokens == whole
        assert found.features == [
            Feature(modality, data, there) for modality, data, _, there in made
        ]
        assert found.begins == begins
        assert found.column.tolist() == column
        assert [is_pruned(feature) for feature in features] == [KEY in data for _, data, *_ in made]


def settings(rate=None, mode="weights"):
    return SimpleNamespace(video_pruning_rate=rate, mm_encoder_tp_mode=mode)


def test_what_grids_cannot_be_pruned_by_is_refused():
    windows = SimpleNamespace(
        vision_config=SimpleNamespace(depth=3, fullatt_block_indexes=[1]),
    )
    plain = SimpleNamespace(vision_config=SimpleNamespace(depth=3))
    check_grids(Budget(4), plain, settings())
    check_grids(Budget(4, "similarity"), windows, settings(mode="data"))
    with pytest.raises(NotImplementedError, match="expected no video_pruning_rate"):
        check_grids(Budget(4, "divprune"), plain, settings(rate=0.3))
    with pytest.raises(NotImplementedError, match="the last block of the tower attends in windows"):
        check_grids(Budget(4), windows, settings())
    with pytest.raises(NotImplementedError, match="mm_encoder_tp_mode='data'"):
        check_grids(Budget(4), plain, settings(mode="data"))


@pytest.mark.parametrize(
    ("v2", "parts", "compiled", "message"),
    [
        (False, 1, False, "VLLM_USE_V2_MODEL_RUNNER=1"),
        (True, 2, False, "pipeline_parallel_size: expected 1"),
        (True, 1, True, "compile_mm_encoder: expected False"),
    ],
)
def test_engines_without_what_budgets_need_are_refused(v2, parts, compiled, message):
    def engine(v2=True, parts=1, compiled=False):
        return SimpleNamespace(
            use_v2_model_runner=v2,
            parallel_config=SimpleNamespace(pipeline_parallel_size=parts),
            compilation_config=SimpleNamespace(compile_mm_encoder=compiled),
        )

    check_grids_engine(engine())
    with pytest.raises(NotImplementedError, match=message):
        check_grids_engine(engine(v2, parts, compiled))
