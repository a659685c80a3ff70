"""The model of each op's time: what goes in comes from the tables, and more never takes less."""

import dataclasses

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import goals, model
from benchmarks.model import DEVICES, LAUNCHES, Device, Kernel, Launch, estimate

DEVICE = Device("test", 1e12, 10, 1e9, dram_cycles=1000, l2_cycles=100, launch_gap=1e-6)
TABLE = {"a": Kernel(3, (50, 200)), "b": Kernel(2, (10,))}
LAUNCHED = [Launch("a", 25, 8, iterations=4), Launch("b", 1, 2)]


def test_an_estimate_is_what_the_parts_say():
    """Three of 25 blocks on a multiprocessor are six warps a scheduler, of 50 + 4 x 200 slots."""
    found = estimate(LAUNCHED, 2_000_000, DEVICE, TABLE)
    assert found.gaps == pytest.approx(2e-6)
    assert found.trips == pytest.approx((3 * 1000 + 2 * 100) / 1e9)
    assert found.bytes == pytest.approx(2e-6)
    assert found.issue == pytest.approx((850 * 6 + 10) / 1e9)
    assert found.total == pytest.approx(2e-6 + 3.2e-6 + 5.11e-6)
    assert estimate(LAUNCHED, 6_000_000, DEVICE, TABLE).total == pytest.approx(11.2e-6)


MOVED = 5_110_000  # takes as long as to issue: more of either shows


def total(launches=LAUNCHED, moved=MOVED, device=DEVICE, table=TABLE) -> float:
    return estimate(launches, moved, device, table).total


@pytest.mark.parametrize("name, more", (("blocks", 35), ("warps", 12), ("iterations", 5)))
def test_more_of_a_launch_takes_longer(name, more):
    assert total([dataclasses.replace(LAUNCHED[0], **{name: more}), LAUNCHED[1]]) > total()


def test_more_work_takes_longer():
    assert total(moved=MOVED + 1000) > total()
    assert total([*LAUNCHED, LAUNCHED[1]]) > total()
    assert total(table={**TABLE, "b": Kernel(3, (10,))}) > total()
    assert total(table={**TABLE, "b": Kernel(2, (10, 1))}) > total()


@pytest.mark.parametrize(
    "name, slower",
    [
        ("bandwidth", 0.9e12),
        ("multiprocessors", 8),
        ("clock", 0.9e9),
        ("dram_cycles", 1100),
        ("l2_cycles", 110),
        ("launch_gap", 1.1e-6),
        ("schedulers", 2),
    ],
)
def test_a_slower_device_takes_longer(name, slower):
    assert total(device=dataclasses.replace(DEVICE, **{name: slower})) > total()


def test_every_op_is_covered_and_every_kernel_is_in_the_table():
    cases, table = goals.cases("meta"), model.kernels()
    assert set(LAUNCHES) == {case.op for case in cases} == set(benchmarks.OPS)
    for case in cases:
        for device in DEVICES:
            launches = LAUNCHES[case.op](device, *case.make())
            assert all(launch.blocks > 0 and launch.iterations > 0 for launch in launches)
            found = estimate(launches, case.bytes_moved, device, table)
            assert found.total > found.gaps > 0 and found.issue > 0
    with pytest.raises(ValueError, match=r"gone is not in code_generation\.md"):
        estimate([Launch("gone", 1, 1)], 0, DEVICE, table)


def test_where_there_are_clusters_they_share_a_row():
    """2,944 tokens and 32 heads are too much for one block: without clusters, four launches."""
    query, key = (
        torch.empty(1, 32, n, 128, dtype=torch.bfloat16, device="meta") for n in (1, 2944)
    )
    with_clusters, without = (
        [x.kernel for x in LAUNCHES["attention_topk"](device, query, key)] for device in DEVICES
    )
    first = "attention_scores: key_pass<bf16, 4, 0>"
    assert with_clusters == [first, "attention_topk: finish_and_select_in_cluster"]
    assert without == [
        first,
        "attention_scores: merge_statistics",
        "attention_scores: finish_scores",
        "select_topk: select_held<512, 8, f32>",
    ]


def test_the_model_reads_the_table_of_waits():
    table = model.kernels()
    assert table["architectures: probe"] == Kernel(0, ())
    assert table["attention_scores: merge_statistics"].trips > 0
    assert all(kernel.loops for name, kernel in table.items() if "select_held" in name)


def test_it_is_one_of_bfloat16():
    query, key = (torch.empty(1, 4, 8, 128, dtype=torch.float16, device="meta") for _ in range(2))
    with pytest.raises(
        ValueError, match=r"model is one of bfloat16 .*, got torch\.float16 with 128"
    ):
        LAUNCHES["attention_scores"](DEVICE, query, key)
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 with 64"):
        LAUNCHES["passive_attention"](DEVICE, query[..., :64].to(torch.bfloat16), key, key)


def test_what_is_printed_calls_itself_a_model(capsys):
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("This is a model and not a measurement.")
    titles = [line for line in printed.splitlines() if line.startswith("## ")]
    assert titles == [f"## {x.name}: a model, not a measurement; microseconds" for x in DEVICES]
    rows = [line for line in printed.splitlines() if line.startswith("| select_topk | B=1, N=576,")]
    assert [row.endswith("| <= 4 us |") for row in rows] == [True, False]
