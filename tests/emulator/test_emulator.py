"""The emulator catches what would hang, race or be undefined on a GPU: planted mistakes."""

import re
import subprocess

import pytest

from emulator import build

THREADS = 64  # of a planted kernel's only block
BEFORE = [0, *range(THREADS - 1)]
LANE_BEFORE = [0 if i % 32 == 0 else i - 1 for i in range(THREADS)]


@pytest.fixture
def defects(kernels):
    return kernels.defects


# ---- Order ---------------------------------------------------------------------------------------


def test_right_kernels_are_right_in_every_order(defects, order):
    assert defects.neighbour(True) == BEFORE
    assert defects.lane_neighbour(True) == LANE_BEFORE
    assert defects.copies(0).tolist()[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "kernel, expected", [("neighbour", BEFORE), ("lane_neighbour", LANE_BEFORE)]
)
def test_a_missing_barrier_shows_in_some_order(defects, set_order, kernel, expected):
    right = {}
    for order in build.ORDERS:
        set_order(order)
        right[order] = getattr(defects, kernel)(False) == expected
    # Low threads first happens to suit these kernels: why one order is not enough.
    assert right == {"forward": True, "reverse": False, "random": False}


def test_what_depends_on_who_comes_first_differs_between_orders(defects, set_order):
    results = {}
    for order in build.ORDERS:
        set_order(order)
        results[order] = defects.slots()
        assert sorted(results[order]) == list(range(THREADS))
    assert results["forward"] == list(range(THREADS))
    assert results["reverse"] == list(range(THREADS))[::-1]
    assert results["random"] not in (results["forward"], results["reverse"])


def test_blocks_that_rely_on_each_other_show_in_reverse(defects, set_order):
    set_order("forward")
    assert defects.block_chain() == list(range(1, 9))
    set_order("reverse")
    assert defects.block_chain() == [1] * 8


def test_random_order_repeats_with_its_seed(kernels, set_order):
    set_order("random")  # so that the order is put back

    def slots(seed):
        kernels.set_order("random", seed)
        return kernels.defects.slots()

    assert slots(3) == slots(3) != slots(4)


def test_unknown_order(kernels):
    with pytest.raises(RuntimeError, match="no thread order 'sideways'"):
        kernels.set_order("sideways")


# ---- Barriers and collectives --------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("divergent_barrier", "40 at __syncthreads .*defects.cpp:.*24 of 64 have returned"),
        ("early_return", "40 at __syncthreads .*defects.cpp:.*24 of 64 have returned"),
        ("two_barriers", "came to __syncthreads .* while others wait at __syncthreads"),
        ("two_collectives", "came to __(shfl|ballot)_sync .* others wait at __(ballot|shfl)_sync"),
        ("barrier_meets_collective", "40 at __syncthreads .* 24 of warp 1 at __any_sync"),
        ("absent_lanes", "8 of warp 1 at __shfl_xor_sync .* 56 of 64 have returned"),
        ("some_lanes", "__shfl_xor_sync .* does not name all 32 lanes"),
        ("some_lanes_reduced", "__reduce_add_sync .* does not name all 32 lanes"),
        (
            "two_reductions",
            "came to __reduce_(add|max)_sync .* others wait at __reduce_(max|add)_sync",
        ),
        ("partial_warp", "16 of warp 1 at __syncwarp .* 32 of 48 have returned"),
        ("throwing", "thrown by a kernel"),
        ("trap", r"thread \(5, 0, 0\): __trap"),
    ],
)
def test_divergence_is_an_error_that_says_where(defects, order, kernel, message):
    block = rf"emulator: kernel {kernel}, block \([01], 0, 0\)"
    with pytest.raises(RuntimeError, match=f"{block}.*{message}"):
        getattr(defects, kernel)()
    assert defects.neighbour(True) == BEFORE  # the emulator is as good as before


# ---- Clusters ------------------------------------------------------------------------------------


def test_blocks_of_a_cluster_reach_into_each_other(defects, order):
    for size in (1, 2, 3, 6):
        expected = []
        for block in range(6):
            first = block // size * size
            after = first + (block - first + 1) % size
            expected += [after * THREADS + (i - 1) % THREADS for i in range(THREADS)]
        assert defects.cluster_right(size) == expected


@pytest.mark.parametrize(
    "defect, message",
    [
        ("ends_early", "block whose shared memory another block has mapped|which has ended"),
        ("not_begun", "which may not have begun: there was no cluster_wait yet"),
        ("beyond", "maps shared memory of block 3 of a cluster of 3"),
        ("not_shared", "maps what is no shared memory of its own"),
        ("divergent", "128 of the cluster at cluster_arrive .*defects.cpp:.* 64 of 192 have ret"),
        ("half_a_block", "120 of the cluster at cluster_arrive .* 72 of 192 have returned"),
        ("arrives_twice", "cluster_arrive .*defects.cpp:.* for a second time"),
        ("waits_for_none", "cluster_wait .*defects.cpp:.* without cluster_arrive"),
    ],
)
def test_misuse_of_a_cluster_is_an_error_that_says_where(defects, order, defect, message):
    with pytest.raises(RuntimeError, match=f"kernel cluster, block .*(?:{message})"):
        getattr(defects, f"cluster_{defect}")()
    assert defects.neighbour(True) == BEFORE  # the emulator is as good as before


def test_limits_of_clusters(kernels, defects):
    for size, message in ((0, "1 to 8 blocks"), (9, "1 to 8 blocks"), (4, "whole clusters")):
        with pytest.raises(RuntimeError, match=message):
            defects.cluster_right(size)
    before = kernels.architecture()
    kernels.set_architecture(80)
    try:
        with pytest.raises(RuntimeError, match=r"need code for compute capability 9\.0"):
            defects.cluster_right(2)
        assert len(defects.cluster_right(1)) == 6 * THREADS
    finally:
        kernels.set_architecture(before)


# ---- Dependent launches --------------------------------------------------------------------------


@pytest.mark.parametrize("defect", ["returns", "leaves_to_one"])
def test_a_thread_that_ends_without_having_waited_is_an_error(kernels, defects, order, defect):
    assert defects.dependent_right() == [3 * i for i in range(THREADS)]
    with pytest.raises(RuntimeError, match=r"kernel third, .* ends without await_earlier_kernels"):
        getattr(defects, f"dependent_{defect}")()
    before = kernels.architecture()
    kernels.set_architecture(80)  # older code is launched plainly, where nobody need wait
    try:
        assert defects.dependent_leaves_to_one() == defects.dependent_right()
    finally:
        kernels.set_architecture(before)


# ---- Memory --------------------------------------------------------------------------------------


def test_copies_land_when_they_are_waited_for(defects, order):
    first, second = defects.copies(0).reshape(2, -1)
    values = first.copy()
    assert (values == range(THREADS * 4)).all()
    assert (second.reshape(-1, 4)[::2] == values.reshape(-1, 4)[::2]).all()
    assert (second.reshape(-1, 4)[1::2] == 0).all()  # not valid: zeros

    first, second = defects.copies(1).reshape(2, -1)
    assert (first == values).all() and (second != second).all()

    assert (defects.copies(2) != defects.copies(2)).all()  # NaN throughout


def test_copies_must_be_aligned(defects):
    with pytest.raises(RuntimeError, match="copy_async moves 16 bytes, aligned to 16"):
        defects.misaligned_copy()


def test_shared_memory_begins_as_nan_that_differs_from_block_to_block(defects):
    values, bits = defects.uninitialised()
    assert (values != values).all()
    assert len(set(bits.tolist())) == len(bits)


@pytest.mark.parametrize(
    "kernel, at, message",
    [
        ("shared_overrun", 1, "shared object of type .*Ints was written past its last byte"),
        ("shared_overrun", -1, "shared object of type .*Ints was written before its first byte"),
        ("dynamic_overrun", 100, "dynamic shared memory was written past its last byte"),
        ("dynamic_overrun", -1, "dynamic shared memory was written before its first byte"),
    ],
)
def test_writes_next_to_shared_memory_are_seen(defects, kernel, at, message):
    with pytest.raises(RuntimeError, match=f"kernel {kernel}, block .*{message}"):
        getattr(defects, kernel)(at)


def test_limits_of_a_launch(kernels, defects):
    defects.idle(grid_x=3, block_x=1024)
    defects.idle(grid_x=0)  # no blocks, no launch
    defects.idle(dynamic_shared=64 << 10)
    for limits, message in (
        ({"block_x": 1025}, "1 to 1024 threads"),
        ({"block_x": 1, "block_z": 65}, "64 in z"),
        ({"block_x": 0}, "1 to 1024 threads"),
        ({"grid_y": 65536}, "65535 in y and z"),
        ({"grid_x": 2**31}, "at most 2\\^31 - 1 blocks in x"),
        ({"dynamic_shared": (64 << 10) + 1}, "more shared memory than a block may have"),
    ):
        with pytest.raises(RuntimeError, match=f"kernel idle: .*{message}"):
            defects.idle(**limits)
    with pytest.raises(RuntimeError, match="more than 48 KB of static shared memory"):
        defects.large_static()
    before = kernels.shared_limit()
    try:
        for limit in (48, 64, 227):
            kernels.set_shared_limit(limit << 10)
            defects.static_and_dynamic(limit - 8 << 10)  # beside 8 KB of static
            with pytest.raises(RuntimeError, match=r"static_and_dynamic.* may have: \d+ of"):
                defects.static_and_dynamic(limit - 7 << 10)
    finally:
        kernels.set_shared_limit(before)


def test_launches_are_counted_by_kernel(kernels, defects):
    before = kernels.launches().get("idle", 0)
    defects.idle()
    defects.idle(grid_x=0)
    assert kernels.launches()["idle"] == before + 1


# ---- What must not compile -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement, message",
    [
        ("atomicAdd(&number, 1)", None),
        ("atomicAdd(&fraction, 1.0f)", "no matching function"),
        ("__shfl_sync(~0u, number, 0)", None),
        ("__shfl_sync(~0u, small, 0)", "CUDA has no shuffle of this type"),
        ("__reduce_add_sync(~0u, number)", None),
        ("__reduce_add_sync(~0u, fraction)", "CUDA reduces int and unsigned alone"),
    ],
)
def test_only_what_cuda_and_the_rules_allow_compiles(kernels, tmp_path, statement, message):
    source = tmp_path / "kernel.cpp"
    source.write_text(
        f"""#include "vtp/warp.cuh"
        void kernel() {{
          int number = 0; float fraction = 0; uint16_t small = 0;
          (void)number, (void)fraction, (void)small;
          {statement};
        }}"""
    )
    folders = (build.HERE, build.HERE / "cuda", build.ROOT / "csrc")
    flags = ["-std=c++17", "-fsyntax-only", "-DVTP_EMULATOR", *(f"-I{path}" for path in folders)]
    run = subprocess.run(["g++", *flags, source], capture_output=True, text=True)
    if message is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0 and re.search(message, run.stderr), run.stderr
