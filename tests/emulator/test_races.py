"""No two accesses to the same memory race: barriers order them all, whatever the timing."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from emulator import build, cases

READ, WRITE = "reads", "writes"
RACES = {  # what each thread of the pair does, either way round
    "neighbour_races": {READ, WRITE},
    "lane_neighbour_races": {READ, WRITE},
    "shuffle_as_barrier": {READ, WRITE},
    "reused_scratch": {READ, WRITE},
    "same_value": {WRITE},
    "early_total": {READ, "atomically changes"},
    "early_copies": {READ, WRITE},
    "block_chain": {READ, WRITE},
    "shared_total": {WRITE},
    "cluster_no_barrier": {READ, WRITE},
    "cluster_between": {READ, WRITE},
}
TOO_EARLY = {  # what the kernel does, and what an earlier one does
    "dependent_reads": (READ, WRITE),
    "dependent_reads_oldest": (READ, WRITE),
    "dependent_writes": (WRITE, "(?:reads|writes)"),
    "dependent_overwrites": (WRITE, "(?:reads|writes)"),
}
# What products of a warpgroup read: not fenced, or written while others may still multiply.
UNFENCED = r"a product of thread \d+ reads \(.*\) what thread \d+ writes \(.*\), and has not fenced"
REWRITTEN = (
    r"thread \d+ (?:writes|reads) \(.*warpgroup.cpp.*\) what thread \d+ (?:reads|writes) .*"
    "nothing orders them"
)
PRODUCTS = {"product_fence_before_writes": UNFENCED, "product_rewritten": REWRITTEN}
ENDS_BEFORE = ("a data race", "defects.cpp:", " of another block ", "(at the end of its block)")
CLEAN = (
    "cluster_right",
    "dependent_right",
    "product_none",
    "neighbour_is_right",
    "lane_neighbour_is_right",
    "slots",
)


@pytest.fixture(scope="module")
def run_racing():
    """A function that runs a script of this folder with the build that looks for races."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    if shutil.which("addr2line") is None:
        pytest.skip("no addr2line here")
    build.build("races")
    environment = {**os.environ, "PYTHONPATH": str(build.HERE.parent)}

    def run(order, script, *arguments):
        environment["VTP_EMULATOR_ORDER"] = order
        command = [sys.executable, build.HERE / script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("order", build.ORDERS)
def test_planted_races_are_found_in_every_order_of_threads(run_racing, order):
    run = run_racing(
        *(order, "planted.py", "races"),
        *(*RACES, *TOO_EARLY, *PRODUCTS, "cluster_ends_before", *CLEAN),
    )
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    for name, verbs in RACES.items():
        pattern = r"a data race: thread \d+ (.*) \(.*defects.cpp:\d+\) what thread \d+ "
        pattern += r"(?:of another block )?(.*) \(.*defects.cpp:\d+\), and nothing orders them"
        match = re.search(pattern, reports[name])
        assert match and set(match.groups()) == verbs, (name, reports[name])
    for name, (does, earlier) in TOO_EARLY.items():
        pattern = rf"a data race: thread \d+ {does} \(.*defects.cpp:\d+\) what an earlier kernel "
        pattern += rf"{earlier} \(.*defects.cpp:\d+\), and has not waited for it"
        assert re.search(pattern, reports[name]), (name, reports[name])
    for name, pattern in PRODUCTS.items():
        assert re.search(f"a data race: {pattern}", reports[name]), (name, reports[name])
    assert all(part in reports["cluster_ends_before"] for part in ENDS_BEFORE)
    assert [reports[name] for name in CLEAN] == [""] * len(CLEAN)


def test_no_op_races(run_racing, draw):
    run = run_racing("random", "cases.py", "races", str(draw.integer(0, 2**31)))
    where = run.stdout.strip().rpartition("\n")[2]
    assert run.returncode == 0, f"{where}:\n{run.stderr[-4000:]}"


def test_cases_need_the_barriers(run_racing):
    """Or they would not show that one is missing. (A few stand for the safety of callers.)"""
    ops = list(cases.OPS)
    shares = [["primitives", *ops[::2]], ops[1::2]]
    with ThreadPoolExecutor(len(shares)) as pool:
        runs = list(pool.map(lambda share: run_racing("forward", "barriers.py", *share), shares))
    assert all(run.returncode == 0 for run in runs), [run.stderr[-4000:] for run in runs]
    lines = [line.split(": ", 1) for run in runs for line in run.stdout.splitlines()]
    barriers = {barrier for barrier, _ in lines}
    needed = {barrier for barrier, purpose in lines if purpose != "no case needs it"}
    assert barriers and len(barriers - needed) <= len(barriers) // 6, barriers - needed
