"""What kernels ask of memory: the counter counts right, and csrc/traffic.md says what it counts."""

import dataclasses

import pytest

from emulator import build, serving, traffic

SECTORS = 4  # of 32 ints


@pytest.fixture(scope="module")
def planted():
    """A function that counts the traffic of a kernel of requests.cpp."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    with traffic.workers(1) as pool:
        yield lambda *call: pool.submit(traffic.planted, *call).result()


@pytest.fixture
def counted(planted):
    """The same for a kernel launched once."""

    def count(name, *arguments):
        (launch,) = planted(name, arguments)
        return launch

    return count


def of(launch, access, shared=False):
    """(requests, lanes, sectors or passes, ideally, most of one request)."""
    found = [x for x in launch.requests if x.access == access and x.shared == shared]
    sums = [sum(getattr(x, field) for x in found) for field in ("count", "lanes", "units", "ideal")]
    return (*sums, max((x.most for x in found), default=0))


NONE = (0, 0, 0, 0, 0)
FULL = (1, 32, SECTORS, SECTORS, SECTORS)  # one request of an int a lane, side by side


# ---- Global memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stride, offset, sectors, ideal",
    [
        (1, 0, 4, 4),  # side by side
        (1, 1, 5, 4),  # across sectors
        (2, 0, 8, 4),
        (8, 0, 32, 4),  # uncoalesced
        (0, 0, 1, 1),  # all lanes read the same int
    ],
)
def test_a_request_takes_the_sectors_it_touches(counted, stride, offset, sectors, ideal):
    launch = counted("strided", stride, offset)
    assert of(launch, "load") == (1, 32, sectors, ideal, sectors)
    assert of(launch, "store") == FULL
    assert (launch.cold_reads, launch.first_writes) == (sectors, SECTORS)
    assert launch.efficiency("load") == ideal / sectors


def test_idle_lanes(counted):
    launch = counted("idle_lanes", 20)
    assert of(launch, "load") == (1, 20, 3, 3, 3)
    assert of(launch, "store") == FULL


def test_a_type_aligned_below_its_size_is_moved_in_pieces(counted):
    aligned, pieces = counted("pairs", True), counted("pairs", False)
    for access in ("load", "store"):
        assert of(aligned, access) == (1, 32, 8, 8, 8)
        assert of(pieces, access) == (2, 64, 16, 8, 8)
    assert aligned.cold_reads == pieces.cold_reads == 8


def test_lanes_that_skip_an_iteration_are_in_step_again_after_a_meeting(counted):
    lanes = 4 * 32 - 5
    assert of(counted("skipping", True, 5), "load") == (4, lanes, 16, 16, 4)
    # What is not modelled: without a meeting they stay behind, and touch a sector of their own.
    assert of(counted("skipping", False, 5), "load") == (4, lanes, 19, 16, 5)


def test_atomics_in_global_memory(counted):
    launch = counted("global_atomics")
    assert of(launch, "atomic") == (4, 2 + 64, 4, 4, 1)
    assert (launch.cold_reads, launch.first_writes, launch.load_phases) == (3, 3, 0)


# ---- Shared memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, passes", [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (0, 1)])
def test_bank_conflicts(counted, stride, passes):
    launch = counted("banks", stride)
    for access in ("load", "store"):
        assert of(launch, access, shared=True) == (1, 32, passes, 1, passes)
    assert of(launch, "load") == NONE and launch.cold_reads == 0


@pytest.mark.parametrize("stride, passes", [(1, 4), (2, 8)])
def test_sixteen_bytes_a_lane_take_four_passes(counted, stride, passes):
    assert of(counted("wide", stride), "load", shared=True) == (1, 32, passes, 4, passes)


def test_neighbouring_words_are_one_request_in_shared_memory(counted):
    assert of(counted("merged", 4), "load", shared=True) == (1, 32, 4, 4, 4)
    # Two words and one: every fourth bank, so four passes each.
    assert of(counted("merged", 3), "load", shared=True) == (2, 64, 4 + 4, 2 + 1, 4)
    assert of(counted("fields"), "store", shared=True) == (1, 32, 4, 4, 4)


@pytest.mark.parametrize("words, stride, passes", [(32, 1, 1), (1, 1, 1), (2, 32, 2)])
def test_atomics_in_shared_memory(counted, words, stride, passes):
    launch = counted("shared_atomics", words, stride)
    assert of(launch, "atomic", shared=True) == (1, 32, passes, 1, passes)


@pytest.mark.parametrize("stride, passes", [(1, 4), (2, 8), (8, 32)])
def test_matrix_loads_are_the_rows_that_lanes_name(counted, stride, passes):
    launch = counted("matrix_load", stride)
    assert of(launch, "load", shared=True) == (1, 32, passes, 4, passes)
    assert launch.collectives == 0


@pytest.mark.parametrize("valid", [True, False])
def test_asynchronous_copies_read_and_write_once(counted, valid):
    launch = counted("async_copy", valid)
    assert of(launch, "load") == ((1, 32, 16, 16, 16) if valid else NONE)
    assert of(launch, "store", shared=True) == (1, 32, 4, 4, 4)
    assert of(launch, "load", shared=True) == (1, 32, 4, 4, 4)
    assert launch.load_phases == int(valid)


# ---- Blocks and launches -------------------------------------------------------------------------


def test_what_blocks_share_comes_from_dram_once(counted):
    launch = counted("shared_input")
    warps, rounds = 3 * 2, 2
    assert (launch.blocks, launch.threads) == (3, 64)
    assert launch.cold_reads == SECTORS
    assert launch.block_reads == 3 * SECTORS
    assert of(launch, "load")[:3] == (warps * rounds, warps * rounds * 32, warps * rounds * SECTORS)
    assert launch.first_writes == warps * SECTORS


def test_shared_memory_of_another_block_is_shared_memory(counted):
    launch = counted("cluster")
    assert of(launch, "load", shared=True) == (4, 4 * 32, 4, 4, 1)
    assert of(launch, "load") == NONE and of(launch, "store")[:2] == (4, 4 * 32)
    assert launch.barriers == 4 * 2


def test_what_an_earlier_launch_touched_does_not_come_from_dram(planted):
    first, second = planted("chain")
    assert (first.cold_reads, first.first_writes, first.passed_on) == (SECTORS, SECTORS, 0)
    # The input once more, what lies between twice: read and written again.
    assert (second.cold_reads, second.first_writes) == (0, SECTORS)
    assert second.passed_on == SECTORS and second.block_reads == 2 * SECTORS
    (alone,) = planted("strided", (1, 0))  # a call of its own
    assert alone.cold_reads == SECTORS


def test_meetings_and_load_phases(counted):
    launch = counted("phases")
    assert (launch.barriers, launch.collectives, launch.load_phases) == (1, 2 * 2, 2)
    assert of(launch, "load") == (2 * 3, 2 * 3 * 32, 2 * 3 * SECTORS, 2 * 3 * SECTORS, SECTORS)


def test_products_of_tensor_cores_are_no_meetings(counted):
    launch = counted("products")
    assert (launch.collectives, launch.load_phases) == (0, 1)


def test_parameters_tables_and_local_variables_are_no_traffic(counted):
    assert counted("no_traffic").requests == []


def test_counts_do_not_depend_on_the_order_of_threads(planted):
    for name, *arguments in (("chain",), ("skipping", True, 5), ("merged", 3), ("phases",)):
        forward, *others = (
            [dataclasses.replace(x, requests=sorted(x.requests, key=str)) for x in launches]
            for launches in (planted(name, arguments, order) for order in build.ORDERS)
        )
        assert all(other == forward for other in others), name


# ---- Limits and the table ------------------------------------------------------------------------


def call(loads=(4, 4), bound=256):
    """A call of one launch, of sectors that would do and sectors asked for."""
    ideal, units = loads
    requests = traffic.Requests(1, "load", False, 4, 1, 32, units, ideal, units)
    launch = traffic.Launch("move", 1, 32, 4, 4, 0, 4, 0, 0, 1, [requests])
    return traffic.Counted("move", "llava", "a case", bound, [launch])


def test_what_passes_a_limit_is_told():
    assert list(traffic.complaints([call()], {})) == []
    assert list(traffic.complaints([call(loads=(19, 20), bound=251)], {})) == []
    (words,) = traffic.complaints([call(), call(loads=(94, 100))], {})
    assert words == "move: move: loads: llava 94.0 % of the sectors do"
    (words,) = traffic.complaints([call(bound=250)], {})
    assert words == "move: all: bytes: llava 1.024 of the bound"


def test_an_exception_must_be_needed():
    exceptions = {("move", "all", "bytes"): "a reason"}
    assert list(traffic.complaints([call(bound=250)], exceptions)) == []
    (words,) = traffic.complaints([call()], exceptions)
    assert words == "move: all: bytes: within the limits, the exception can go"


def test_a_change_is_told():
    table = traffic.render([call()], "12.2.0")
    assert list(traffic.differences(table, table)) == []
    changed = traffic.render([call(loads=(100, 101))], "12.2.0")
    assert sorted(traffic.differences(changed, table)) == [
        "move, llava, 1 move: sectors, % 99 / -, in the table 100 / -",
        "move, llava, 1 move: without L1, KB 3.2, in the table 0.1",
    ]
    empty = traffic.render([], "12.2.0")
    assert list(traffic.differences(table, empty)) == ["move, llava, 1 move: is not in the table"]
    (words,) = traffic.differences(empty, table)
    assert words == "move, llava, 1 move: is in the table, but was not counted"


def test_the_kernels_ask_for_what_the_table_says():
    if (reason := serving.why_not()) is not None:
        pytest.skip(reason)
    counted = traffic.count_all()
    text = traffic.render(counted, traffic.compiler())
    wrong = [
        *traffic.complaints(counted, traffic.EXCEPTIONS),
        *traffic.differences(text, traffic.TABLE.read_text()),
    ]
    assert not wrong, "\n".join(
        [*wrong, "If all is as it should be: python tests/emulator/traffic.py --write"]
    )


def test_another_compiler_may_differ_by_two_percent():
    table = traffic.render([call(loads=(100, 100))], "12.2.0")

    def told(units):
        changed = traffic.render([call(loads=(100, units))], "13.1.0")
        return list(traffic.differences(changed, table))

    assert told(100) == told(101) == []
    assert len(told(104)) == 2


def test_every_op_is_in_the_table():
    from vtp_kernels import reference

    assert {op.split(",")[0].split(" ")[0] for op in traffic.CASES} == set(reference.__all__)
    _, table = traffic.read_table(traffic.TABLE.read_text())
    assert {key[:2] for key in table} == {(op, x) for op in traffic.CASES for x in traffic.SHAPES}
