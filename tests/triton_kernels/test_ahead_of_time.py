"""The Triton kernels compile for GPUs that are not there, and not anew for every shape."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from triton_kernels import ahead_of_time, calls
from triton_kernels.ahead_of_time import ARCHS, SHARED_MEMORY

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled with TRITON_INTERPRET=1"
)
# What is compiled: bfloat16 for all, other types where most of what they differ in shows. sm_80 and
# sm_89 get code much like that of sm_86, which has the least memory: one setting does for them.
DTYPES = dict.fromkeys(ARCHS, (torch.bfloat16,)) | {
    80: (torch.bfloat16, torch.float16),
    86: (torch.bfloat16, torch.float32),
}
ONE_SETTING = (80, 89)
MEMORY_BOUND = (
    "attention_scores",
    "token_contribution",
    "passive_attention",
    "compact_kv",
    "compact_rows",
    "cls_inflection",
)


def compile_op(op, arch):
    all_settings = arch not in ONE_SETTING
    return [
        (dtype, ahead_of_time.compile_calls(calls.of(op, (dtype,)), arch, all_settings))
        for dtype in DTYPES[arch]
    ]


@pytest.fixture(scope="module")
def compiled():
    """{(op, arch): [(dtype, kernels)]}, by as many processes as there are processors."""
    tasks = [(op, arch) for op in calls.OPS for arch in ARCHS]
    workers = min(len(tasks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(tasks, pool.map(compile_op, *zip(*tasks, strict=True)), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", calls.OPS)
def test_compiles_and_fits(compiled, op, arch):
    for dtype, kernels in compiled[op, arch]:
        assert kernels, dtype
        for kernel in kernels:
            assert kernel.shared <= SHARED_MEMORY[arch], kernel
            assert kernel.registers > 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ("attention_scores", "attention_topk", "passive_attention"))
def test_matrices_are_multiplied_by_tensor_cores_but_for_float32(compiled, op, arch):
    """float32 is multiplied as it is: its products are no instructions for matrices."""
    for dtype, kernels in compiled[op, arch]:
        instructions = set().union(*(kernel.instructions for kernel in kernels))
        products = {name for name in instructions if "mma" in name}
        wanted = {
            torch.bfloat16: {"mma.sync.bf16", "wgmma.bf16", "tcgen05.mma:f16"},
            torch.float16: {"mma.sync.f16", "wgmma.f16", "tcgen05.mma:f16"},
            torch.float32: set(),
        }[dtype]
        assert products & wanted if wanted else not products


@pytest.mark.parametrize("op", calls.OPS)
def test_new_shapes_do_not_compile_anew(draw, op):
    """50 of them: all that may differ is whether strides are 1, or multiples of 16."""
    compiled = {}

    def note(name, kernel, settings, seconds):
        compiled.setdefault(name, {})[id(kernel)] = kernel

    with ahead_of_time.gpu(80, note, all_settings=False), torch.no_grad():
        for _ in range(50):
            batch, length = draw.integer(1, 9), draw.integer(17, 3000)
            next(calls.of(op, (torch.bfloat16,), batch, length))()
    assert compiled
    for name, kernels in compiled.items():
        assert len(kernels) <= 4, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", MEMORY_BOUND)
def test_loads_are_wide(compiled, op, arch):
    (_, kernels), *_ = compiled[op, arch]
    assert any({"v4.b32", "v2.b64"} & kernel.instructions for kernel in kernels), kernels
