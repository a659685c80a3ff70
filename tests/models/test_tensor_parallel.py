"""Two ranks with half of the heads each keep what one process keeps, and say what it says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_rank
import torch
from tiny_llava import three, tiny_llava
from torch import nn

import vtp_kernels as vtp
from vtp_kernels.models.attention.ranks import all_heads

RANKS = 2
HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
NEEDS_ACCELERATE = pytest.mark.skipif(
    not HAS_ACCELERATE, reason="transformers needs accelerate for this"
)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    with torch.no_grad():
        return tensor_parallel_rank.run(model, three(), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    """A function: what a rank kept and said, by who spread the model over the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    model.save_pretrained(folder)
    torch.save(three(), folder / "inputs.pt")
    ways = ["torch", *(["transformers"] if HAS_ACCELERATE else [])]
    script, paths = tensor_parallel_rank.__file__, [str(Path(vtp.__file__).parents[1])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(RANKS), str(folder), *ways],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, said
    return lambda by, rank: torch.load(folder / f"answers_{by}_{rank}.pt")


@pytest.mark.parametrize("by", ["torch", pytest.param("transformers", marks=NEEDS_ACCELERATE)])
@pytest.mark.parametrize("rank", range(RANKS))
def test_ranks_keep_what_one_process_keeps(expected, answers, by, rank):
    found = answers(by, rank)
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        wanted = expected[name]
        assert answer["kept"].keys() == wanted["kept"].keys()
        for layer, kept in wanted["kept"].items():
            assert torch.equal(answer["kept"][layer], kept), (name, layer)
        assert answer["keys"] == wanted["keys"]
        assert torch.equal(answer["sequences"], wanted["sequences"])
        torch.testing.assert_close(answer["logits"], wanted["logits"], rtol=0, atol=5e-5)


def test_heads_in_pieces_that_are_no_dtensors_are_refused(model):
    attention = model.model.language_model.layers[0].self_attn
    whole = attention.q_proj
    attention.q_proj = nn.Linear(64, 32, bias=False)  # two of four heads
    try:
        with pytest.raises(NotImplementedError, match=r"32 features for 4 heads of 16 .*DTensors"):
            vtp.apply(model, vtp.FastV(2))
    finally:
        attention.q_proj = whole


def test_weights_in_one_piece_need_nobody_else(model):
    heads = all_heads(model.model.language_model.layers[0].self_attn)
    scores, query = torch.rand(2, 5), torch.rand(2, 4, 1, 16)
    assert heads.mean(scores, query) is scores
    assert heads.gather(query, scores)[1] is scores
