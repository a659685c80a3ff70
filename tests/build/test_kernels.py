"""The CPU kernels on their own: sanitized runs, and instruction sets that stay apart."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vtp_kernels import _native

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ISA_FLAGS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
PER_ISA = tuple(
    CPU / f"{op}.cpp"
    for op in (
        "assign_rows",
        "attention_scores",
        "cls_inflection",
        "merge_rows",
        "passive_attention",
        "select_diverse",
        "select_topk",
        "token_contribution",
    )
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-w", "-c", source, "-o", target, *flags]
    subprocess.run(command, check=True)
    return target


def widest_isa() -> str:
    if _native.missing is not None:
        return "generic"
    return json.loads(torch.ops.vtp_kernels.build_info())["cpu_isa"]


def test_sanitized_on_random_inputs(tmp_path):
    """Every kernel, as compiled for this CPU, over ragged, empty and non-finite inputs."""
    isa = widest_isa()
    sources = (*CPU.glob("*.cpp"), Path(__file__).with_name("driver.cpp"))
    flags = ("-O1", f"-DVTP_ISA={isa}", *SANITIZERS, *ISA_FLAGS[isa])
    objects = [compile_object(source, tmp_path / f"{source.stem}.o", *flags) for source in sources]
    driver = tmp_path / "driver"
    subprocess.run(["g++", *SANITIZERS, "-pthread", *objects, "-o", driver], check=True)
    run = subprocess.run([driver, "1", "40"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == isa, run.stderr[-4000:]


@pytest.mark.skipif(widest_isa() == "generic", reason="one instruction set only")
@pytest.mark.parametrize("source", PER_ISA, ids=lambda path: path.stem)
def test_no_function_is_shared_between_instruction_sets(source, tmp_path):
    """A weak function compiled for AVX could replace its baseline twin at link time."""
    isa = widest_isa()
    flags = (*ISA_FLAGS[isa], f"-DVTP_ISA={isa}", "-O3", "-DNDEBUG")
    target = compile_object(source, tmp_path / "kernel.o", *flags)
    symbols = subprocess.run(
        ["nm", "-C", target], check=True, capture_output=True, text=True
    ).stdout
    weak = [line for line in symbols.splitlines() if line[17:18] in ("W", "w", "u")]
    assert "vtp::cpu::" + isa in symbols
    assert not weak
