"""What the native library needs and shows: one binary for every Python and torch it claims."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtp_kernels
from vtp_kernels import _native

if _native.missing is not None:
    pytest.skip(_native.missing, allow_module_level=True)

LIBRARY = sys.modules["vtp_kernels._C"].__file__


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_needs_libtorch():
    """libtorch.so is what leads to libtorch_cuda.so, where the current stream's symbol lives."""
    needed = re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", LIBRARY))
    assert "libtorch.so" in needed
    foreign = ("libpython", "libtorch_python", "libcudart", "libcuda.")  # the runtime is linked in
    assert not [name for name in needed if name.startswith(foreign)]


def test_exports_nothing_but_its_init_function():
    symbols = output_of("nm", "-D", "--defined-only", LIBRARY).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__C"]


def test_uses_only_stable_interfaces():
    """The limited Python API and libtorch's C shim; torch's C++ symbols change by version."""
    assert LIBRARY.endswith("_C.abi3.so")
    undefined = [line.split()[-1] for line in output_of("nm", "-D", "-u", LIBRARY).splitlines()]
    assert {name for name in undefined if name.startswith(("Py", "_Py"))} == {"PyModule_Create2"}
    cxx = output_of("nm", "-D", "-u", "-C", LIBRARY)
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::", cxx)
    assert any(name.startswith("aoti_torch_") for name in undefined)


def oldest_torch() -> str:
    """As packages are told: torch>=2.10."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    return re.search(r'"torch>=([\d.]+)"', text)[1]


def test_build_info():
    info = json.loads(torch.ops.vtp_kernels.build_info())
    assert info["version"] == vtp_kernels.__version__
    assert info["compiler"] and info["cpu_isa"] in ("generic", "avx2", "avx512")
    assert isinstance(info["cuda_archs"], list)
    assert info["libtorch"] == oldest_torch()


@pytest.mark.parametrize("isa", ["generic", "mmx"])
def test_isa_can_be_narrowed_but_not_invented(isa):
    code = "import torch, vtp_kernels; print(torch.ops.vtp_kernels.build_info())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VTP_CPU_ISA": isa},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(LIBRARY)),
    )
    if isa == "generic":
        assert json.loads(run.stdout)["cpu_isa"] == "generic"
    else:
        assert run.returncode != 0 and "VTP_CPU_ISA=mmx, this CPU has: generic" in run.stderr


def test_results_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 70, 64, generator=generator)
    key = torch.randn(2, 4, 900, 64, generator=generator)
    candidates = torch.rand(2, 900, generator=generator) < 0.8
    visual = torch.rand(2, 70, generator=generator) < 0.8

    targets = torch.arange(5, 900, 11).expand(2, -1)

    def results():
        return (
            vtp_kernels.attention_scores(query, key, candidates=candidates, backend="native"),
            *vtp_kernels.token_contribution(
                query[:, :, 0], key, key, candidates=candidates, backend="native"
            ),
            vtp_kernels.passive_attention(
                query, key[:, :, :70], key[:, :, :70], visual=visual, backend="native"
            ),
            vtp_kernels.cls_inflection(key[:, 0], query[:, 0, 0], backend="native")[1],
            *(
                vtp_kernels.select_diverse(key[:, 0], k, rule=rule, backend="native").indices
                for k, rule in ((200, "maxmin"), (300, "dpp"), (9, "dpp"))
            ),
            assigned := vtp_kernels.assign_rows(key[:, 0], targets, backend="native"),
            vtp_kernels.merge_rows(key[:, 1], assigned, targets, backend="native"),
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        together = results()
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "indices, message",
    [
        ([[0, 7]], r"within \[0, 7\), got 7"),
        ([[-1, 3]], r"within \[0, 7\), got -1"),
        ([[3, 3]], "ascend strictly"),
    ],
)
def test_direct_calls_are_checked_too(indices, message):
    """torch.ops.vtp_kernels.* is reachable without the Python layer: still no stray read."""
    indices, x = torch.tensor(indices), torch.zeros(1, 2, 7, 4)
    ops = torch.ops.vtp_kernels
    for call in (
        lambda: ops.compact_kv([x], [x], indices, None),
        lambda: ops.compact_kv_([x], [x], indices, None),
        lambda: ops.compact_rows([x[:, 0]], indices, None, "left"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_direct_calls_check_shapes_and_dtypes():
    ops, query = torch.ops.vtp_kernels, torch.zeros(1, 4, 1, 8)
    rows, positions = torch.zeros(1, 5, 8), torch.zeros(1, 5, dtype=torch.int64)
    twice, wild = torch.tensor([[3, 3]]), torch.tensor([[3, 5]])
    candidates = torch.ones(1, 5, dtype=torch.bool)

    def scores(key, candidates=candidates, support="all"):
        return ops.attention_scores(
            query, key, candidates, None, None, None, None, 1.0, support, "mean"
        )

    assert scores(torch.zeros(1, 2, 5, 8)).shape == (1, 5)
    for bad, message in (
        (lambda: scores(torch.zeros(1, 2, 5, 9)), r"key must have shape \[1, \*, \*, 8\]"),
        (lambda: scores(torch.zeros(1, 3, 5, 8)), "multiple"),
        (lambda: scores(torch.zeros(1, 2, 5, 8).half()), "key has the wrong dtype"),
        (lambda: scores(torch.zeros(1, 2, 6, 8)), "candidates must have shape"),
        (lambda: scores(torch.zeros(1, 2, 5, 16)[..., ::2]), "stride 1"),
        (lambda: scores(torch.zeros(1, 2, 5, 8), candidates.int()), "wrong dtype"),
        (lambda: scores(torch.zeros(1, 2, 5, 8), support="some"), "no option 'some'"),
        (
            lambda: ops.select_topk(
                torch.zeros(2, 3), torch.ones(3).long(), 0, None, None, None, 1
            ),
            "k_per_row",
        ),
        (lambda: ops.select_topk(torch.zeros(2, 3), None, 1, None, None, None, -1), "capacity"),
        (lambda: ops.assign_rows(rows, twice, None), "row 3 is there twice"),
        (lambda: ops.assign_rows(rows, wild, None), r"within \[0, 5\).* got 5"),
        (lambda: ops.merge_rows(rows, positions, wild, None, "mean"), r"within \[0, 5\).* got 5"),
        (
            lambda: ops.merge_rows(rows, positions + 2, wild - 1, None, "mean"),
            "below the 2 targets",
        ),
        (lambda: ops.merge_rows(rows, positions, wild - 1, None, "weighted"), "weights go with"),
        (lambda: ops.merge_rows(rows, positions, wild - 1, None, "sum"), "no option 'sum'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
