"""What nvcc makes of the kernels, on every architecture, and the reader of its logs.

A kernel that spills, or whose 16-byte loads fell apart, still passes every other test.
"""

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from code_generation import (
    ARCHS,
    FLOAT_ATOMIC,
    LOCAL_MEMORY,
    REGISTER_TOLERANCE,
    TABLE,
    WAITS_ARCH,
    WARPGROUP,
    WARPGROUP_ARCH,
    Code,
    Usage,
    archs_of,
    by_kernel,
    complaints,
    demangler,
    find_nvcc,
    grew,
    images,
    images_of,
    library_build,
    machine_code,
    moves_16_bytes,
    own_build,
    parse,
    read_table,
    read_waits,
    render,
    render_waits,
    short_names,
    shortened,
    waits_arch,
    waits_complaints,
)
from overlap import FIRST, too_early, waits_for_others
from round_trips import Loop, RoundTrips
from sass import disassembled, disassembler, dotted

from vtp_kernels import _native

LOG = """\
nvcc warning : something else
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_80'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 44.385 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_120'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
SPILLING = """\
ptxas info    : Compiling entry function '_Z4sortPf' for 'sm_90a'
ptxas info    : Function properties for _Z4sortPf
    24 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Function properties for helper
    32 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""


def test_a_log_is_read():
    assert parse(LOG) == [
        Usage("_Z4copyPf", "8.0", registers=40, shared=2048),
        Usage("_Z4copyPf", "12.0", registers=32),
    ]
    assert parse("") == []


def test_a_spill_is_seen():
    """A called function's stack frame and spills are the kernel's."""
    (usage,) = parse(SPILLING)
    assert usage == Usage("_Z4sortPf", "9.0a", 64, stack=32, spill_stores=24, spill_loads=36)
    assert usage.local == "32 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads"
    assert Usage("k", "8.0", spill_loads=4).local == "4 bytes spill loads"
    assert Usage("k", "8.0", 255, 49152).local is None


@pytest.mark.parametrize(
    "demangled, short",
    [
        ("vtp::cuda::(anonymous namespace)::probe()", "probe"),
        (
            "void vtp::cuda::(anonymous namespace)::copy<16>(vtp::cuda::Plan<16>, int (*)(int))",
            "copy<16>",
        ),
        (
            "void vtp::cuda::(anonymous namespace)::pass<__half, (int)4, (bool)1, "
            "(vtp::cuda::(anonymous namespace)::Pass)0>(int)",
            "pass<f16, 4, true, 0>",
        ),
        ("void vtp::cuda::scan<__nv_bfloat16, -1, false>(float)", "scan<bf16, -1, false>"),
        ("void select<float>(vtp::SelectTopk)", "select<f32>"),
    ],
)
def test_names_are_shortened(demangled, short):
    assert shortened(demangled) == short


def test_architectures_are_named_by_compute_capability():
    assert [dotted(name) for name in ("sm_75", "90a", "120")] == ["7.5", "9.0a", "12.0"]


USAGES = [
    Usage("copy: kernel<2>", "9.0", 40),
    Usage("copy: kernel<2>", "10.0", 48),
    Usage("copy: kernel<10>", "9.0", 60, 2048),
]


def test_a_table_is_read_as_it_was_written():
    table = render(USAGES, "13.0.88")
    assert "| kernel | 9.0 | 10.0 |\n" in table and "| `copy: kernel<10>` | 60+2048 |  |" in table
    nvcc, recorded = read_table(table)
    assert nvcc == "13.0.88" and list(recorded.values()) == USAGES
    assert list(complaints(USAGES, nvcc, table)) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"registers": 41}, "on 9.0 is 41, in the table 40"),
        ({"registers": 39}, "on 9.0 is 39, in the table 40"),
        ({"shared": 8}, r"on 9.0 is 40\+8, in the table 40"),
        ({"spill_stores": 4}, "on 9.0 uses local memory: 4 bytes spill stores"),
        ({"stack": 8}, "on 9.0 uses local memory: 8 bytes stack frame"),
        ({"kernel": "copy: new"}, "new on 9.0 is not in the table"),
        ({"kernel": "copy: new"}, r"kernel<2> on 9.0 is in the table, but was not built"),
    ],
)
def test_a_change_is_told(change, words):
    changed = [Usage(**{**vars(USAGES[0]), **change}), *USAGES[1:]]
    told = list(complaints(changed, "13.0.88", render(USAGES, "13.0.88")))
    assert any(re.search(words, complaint) for complaint in told)


def test_another_nvcc_has_a_budget():
    table = render(USAGES, "13.0.88")

    def told(**change):
        return list(
            complaints([Usage(**{**vars(USAGES[0]), **change}), *USAGES[1:]], "12.9", table)
        )

    assert told(registers=40 + REGISTER_TOLERANCE, shared=128) == []
    assert len(told(registers=41 + REGISTER_TOLERANCE)) == 1
    assert len(told(stack=8)) == 1


def test_some_architectures_alone_may_be_built():
    usages = [usage for usage in USAGES if usage.arch == "9.0"]
    assert list(complaints(usages, "13.0.88", render(USAGES, "13.0.88"))) == []
    beside = Usage("copy: kernel<2>", "8.7", 99)
    assert list(complaints([*usages, beside], "13.0.88", render(USAGES, "13.0.88"))) == []


def test_16_byte_loads_are_known():
    assert moves_16_bytes({"LDG.E.128"}, "LDG") and moves_16_bytes({"LDG.E.128.SYS"}, "LDG")
    assert not moves_16_bytes({"LDG.E.64", "LDS.128", "LDGSTS.E.BYPASS.128"}, "LDG")


def op_of(kernel: str) -> str:
    return kernel.partition(":")[0]


WAITS = RoundTrips(2, 5, 4, [], [Loop(0, 40, 1.0), Loop(64, 30, 0)], [])


def codes(**change) -> dict:
    waits = dataclasses.replace(WAITS, **change)
    return {
        ("9.0", "copy: kernel<2>"): Code(Counter(), waits),
        ("8.0", "copy: kernel<2>"): Code(Counter(), None),
    }


WAITS_TABLE = render(USAGES, "13.0.88") + render_waits(codes())


def test_a_table_of_waits_is_read_as_it_was_written():
    assert read_waits(WAITS_TABLE) == {"copy: kernel<2>": ["2", "5", "4", "0", "0.0", "40 (1), 30"]}
    assert list(waits_complaints(codes(), "13.0.88", WAITS_TABLE)) == []
    assert list(complaints(USAGES, "13.0.88", WAITS_TABLE)) == []
    with pytest.raises(RuntimeError, match=r"nothing was built for 9\.0"):
        render_waits({})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"first": 3}, "kernel<2> on 9.0 has 3 round trips to the first barrier, in the table 2"),
        ({"trips": 4}, "has 4 round trips, in the table 5"),
        ({"wide": 5}, "has 5 round trips of wide loads, in the table 4"),
        ({"loops": []}, r"has - as its loops, in the table 40 \(1\), 30"),
        ({"loops": [Loop(0, 40, 1.0), Loop(64, 31, 0)]}, r"has 40 \(1\), 31 as its loops"),
        ({"loops": [Loop(0, 40, 2.0), Loop(64, 30, 0)]}, r"has 40 \(2\), 30 as its loops"),
    ],
)
def test_a_change_of_waits_is_told(change, words):
    (told,) = waits_complaints(codes(**change), "13.0.88", WAITS_TABLE)
    assert re.search(words, told)


def test_a_kernel_without_recorded_waits_is_told():
    (told,) = waits_complaints(codes(), "13.0.88", render(USAGES, "13.0.88"))
    assert "not in the table of waits" in told
    other = {("9.0", "copy: other"): Code(Counter(), WAITS)}
    told = "\n".join(waits_complaints({**codes(), **other}, "13.0.88", WAITS_TABLE))
    assert told == "copy: other on 9.0 is not in the table of waits"
    (_, told) = waits_complaints(other, "13.0.88", WAITS_TABLE)
    assert told == "copy: kernel<2> is in the table of waits, but was not built"
    assert not list(
        waits_complaints({("8.0", "copy: k"): Code(Counter(), None)}, "13.0.88", WAITS_TABLE)
    )


def test_another_nvcc_may_wait_a_little_more():
    def told(**change):
        return list(waits_complaints(codes(**change), "12.9", WAITS_TABLE))

    assert told(first=3, trips=1, loops=[Loop(0, 48, 1.0), Loop(0, 9, 0)]) == []
    assert len(told(first=4)) == len(told(trips=7)) == 1
    assert len(told(loops=[Loop(0, 49, 0)])) == 1
    assert grew("loads a wait", "2.0", "4.0") and not grew("loads a wait", "3.5", "4.0")


@pytest.mark.parametrize(
    "instruction, is_one",
    [
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", True),
        ("REDG.E.ADD.F64.RN.STRONG.GPU", True),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", True),
        ("ATOM.E.ADD.F16x2.RN.STRONG.GPU", True),
        ("ATOM.E.ADD.BF16x2.RN.STRONG.GPU", True),
        ("ATOMS.CAST.SPIN", True),
        ("ATOMG.E.CAS.STRONG.GPU", True),
        ("REDG.E.ADD.STRONG.GPU", False),
        ("ATOMS.POPC.INC.32", False),
        ("ATOMS.ADD", False),
        ("REDUX.SUM", False),
    ],
)
def test_additions_of_floats_in_no_order_are_known(instruction, is_one):
    assert bool(FLOAT_ATOMIC.match(instruction)) == is_one


# --- what was built ---------------------------------------------------------------------------


def archs_asked_for() -> list[str]:
    """Those of the library, for example 9.0 and 12.0+PTX."""
    if _native.missing is not None:
        pytest.skip(_native.missing)
    archs = json.loads(torch.ops.vtp_kernels.build_info())["cuda_archs"]
    return archs or pytest.skip("the native library was built without CUDA kernels")


@pytest.fixture(scope="module")
def build():
    archs_asked_for()
    found = library_build()
    if found is None and find_nvcc() is None:
        pytest.skip("neither the logs of the library's build nor an nvcc are here")
    return found or own_build()


@pytest.fixture(scope="module")
def code(build):
    if disassembler() is None:
        pytest.skip("no cuobjdump here: neither the CUDA toolkit's nor triton's")
    return machine_code(build)


def test_kernels_wait_as_the_table_says(build, code):
    if not any(arch == WAITS_ARCH for arch, _ in code):
        pytest.skip(f"nothing was built for {WAITS_ARCH}")
    wrong = list(waits_complaints(code, build.nvcc, TABLE.read_text()))
    assert not wrong, "\n".join(
        [*wrong, "If all is as it should be: python tests/build/code_generation.py --write"]
    )


def test_the_table_of_waits_knows_every_kernel():
    table = TABLE.read_text()
    assert set(read_waits(table)) == {kernel for kernel, _ in read_table(table)[1]}


def test_kernels_are_as_the_table_says(build):
    assert demangler()
    wrong = list(complaints(build.usages(), build.nvcc, TABLE.read_text()))
    assert not wrong, "\n".join(
        [*wrong, "If all is as it should be: python tests/build/code_generation.py --write"]
    )


def test_the_table_knows_every_architecture():
    _, recorded = read_table(TABLE.read_text())
    for kernel, row in by_kernel(recorded.values()).items():
        assert set(row) == archs_of(op_of(kernel)), kernel


def test_every_kernel_is_built_for_every_architecture(build):
    archs = {arch.removesuffix("+PTX") for arch in archs_asked_for()}
    if not os.environ.get("VTP_CUDA_ARCHS") and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert archs == set(ARCHS)
    if library_build() == build:
        for kernel, row in by_kernel(build.usages()).items():
            assert set(row) == archs_of(op_of(kernel), archs), kernel


def test_the_library_has_the_images_asked_for():
    asked = archs_asked_for()
    if disassembler() is None:
        pytest.skip("no cuobjdump here: neither the CUDA toolkit's nor triton's")
    assert images(Path(sys.modules["vtp_kernels._C"].__file__)) == images_of(asked)


@pytest.mark.parametrize(
    "asked, machine, ptx",
    [
        ({"8.0", "9.0"}, {"8.0", "9.0", "9.0a"}, set()),
        ({"9.0+PTX"}, {"9.0", "9.0a"}, {"9.0"}),
        ({"9.0a"}, {"9.0a"}, set()),
        ({"8.0+PTX", "10.0"}, {"8.0", "10.0"}, {"8.0"}),
    ],
)
def test_code_for_a_warpgroup_comes_with_9_0(asked, machine, ptx):
    assert images_of(asked) == (machine, ptx)


def test_no_kernel_uses_local_memory(code):
    found = {key: set(filter(LOCAL_MEMORY.match, found.used)) for key, found in code.items()}
    assert not {key: used for key, used in found.items() if used}


def test_no_kernel_adds_floats_in_no_order(code):
    found = {key: set(filter(FLOAT_ATOMIC.match, found.used)) for key, found in code.items()}
    assert not {key: used for key, used in found.items() if used}


@pytest.mark.usefixtures("code")  # skips where nothing can be read
def test_later_kernels_of_a_call_wait_on_every_path(build):
    for op, file in build.objects().items():
        found = list(disassembled(file, waits_arch(op)))
        names = short_names(function.name for function in found)
        for function in found:
            name = names[function.name]
            assert waits_for_others(function) != (name.split("<")[0] in FIRST), name
            if waits_for_others(function):
                assert not too_early(function), name


def since(oldest: str, arch: str) -> bool:
    """Whether `arch` has what came with `oldest`."""
    return float(arch.rstrip("abcdef")) >= float(oldest)


# Kernels that wait for memory, and the instructions they must move 16 bytes a thread with.
WIDE = (
    ("compact_rows: compact_rows_kernel<", "LDG", "7.5"),
    ("compact_rows: compact_rows_kernel<", "STG", "7.5"),
    ("compact_kv: compact_rows_in_place_kernel<", "LDG", "7.5"),
    ("compact_kv: compact_rows_in_place_kernel<", "STG", "7.5"),
    ("cls_inflection: similarities<.*, true, ", "LDG", "7.5"),
    ("assign_rows: key_norms<", "LDG", "7.5"),
    ("assign_rows: nearest_targets<", "LDGSTS", "8.0"),
    ("merge_rows: merge_members<.*, true", "LDG", "7.5"),
    ("merge_rows: merge_members<.*, true", "STG", "7.5"),
    ("token_contribution: attend<.*, true", "LDG", "7.5"),
    ("token_contribution: compare<.*, true", "LDG", "7.5"),
    ("attention_scores: key_pass<", "LDG", "7.5"),
    ("attention_scores: align_rows<", "STG", "7.5"),
    ("attention_scores_warpgroup: warpgroup_pass<", "LDGSTS", "9.0"),
    ("passive_attention: attend_kernel<", "LDGSTS", "8.0"),
    ("passive_attention: attend_kernel<", "STG", "7.5"),
    ("select_diverse: products<", "LDGSTS", "8.0"),
    ("select_diverse: cosines<", "LDG", "7.5"),
    ("select_diverse: cosines<", "STG", "7.5"),
    ("select_diverse: maxmin_held<", "LDG", "7.5"),
    ("select_diverse: greedy<f32, .*, false, true>", "LDS", "7.5"),
)


@pytest.mark.parametrize("kernel, instruction, oldest", WIDE)
def test_memory_is_moved_16_bytes_at_a_time(code, kernel, instruction, oldest):
    kernels = {
        (arch, name): found.used
        for (arch, name), found in code.items()
        if re.match(kernel, name) and since(oldest, arch)
    }
    assert kernels
    assert not [key for key, used in kernels.items() if not moves_16_bytes(used, instruction)]


@pytest.mark.parametrize(
    "kernel",
    (
        "assign_rows: nearest_targets<",
        "attention_scores: key_pass<",
        "passive_attention: attend_kernel<",
        "select_diverse: products<",
    ),
)
@pytest.mark.parametrize("dtype, oldest", (("f16", "7.5"), ("bf16", "8.0")))
def test_16_bit_floats_are_multiplied_by_tensor_cores(code, kernel, dtype, oldest):
    kernels = {
        (arch, name): found.used
        for (arch, name), found in code.items()
        if name.startswith(f"{kernel}{dtype},") and since(oldest, arch)
    }
    assert kernels
    assert not [
        key for key, used in kernels.items() if not any(x.startswith("HMMA.") for x in used)
    ]


def test_products_of_a_warpgroup_overlap(build, code):
    """ptxas tells of those that it makes wait for each other; here they follow each other at once,
    four for every 64 elements of a row."""
    if not any(arch == WARPGROUP_ARCH for arch, _ in code):
        pytest.skip(f"nothing was built for {WARPGROUP_ARCH}")
    assert "serialize" not in build.logs()[WARPGROUP].read_text()
    kernels = {name: found.used for (_, name), found in code.items() if op_of(name) == WARPGROUP}
    assert len(kernels) == 8
    for name, used in kernels.items():
        products = {x: n for x, n in used.items() if x.startswith("HGMMA")}
        tiles = int(re.search(r", (\d), \d>", name)[1])
        assert sum(products.values()) == 4 * tiles and used["WARPGROUP.DEPBAR.LE"] == 1, name
        assert all(x.startswith("HGMMA.64x128x16.F32") for x in products), name
