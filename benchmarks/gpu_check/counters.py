"""ncu: a dozen of the GPU's counters for one call of every op, each kernel by itself.

    ncu ... python -m benchmarks.gpu_check.counters --device cuda

The clocks are left as they are (`--clock-control none`): machines that are lent forbid more.
"""

import argparse
import csv
import io
import re
import subprocess
from collections.abc import Iterable, Iterator

from benchmarks.gpu_check.sanitizers import OUR_KERNELS

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_bytes.sum",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "launch__registers_per_thread",
)
# If it does not know one of them, ncu measures nothing at all. These are on all chips.
SURE = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum")
OPS = (  # nine that have kernels of their own
    "select_topk",
    "select_diverse",
    "attention_topk",
    "attention_scores",
    "token_contribution",
    "passive_attention",
    "compact_kv",
    "cls_inflection",
    "inflection",
)


def prefix(program: str, metrics: Iterable[str]) -> list[str]:
    """What stands before the command whose kernels are measured."""
    return [
        *(program, "--clock-control", "none", "--target-processes", "application-only"),
        *("--set", "none", "--metrics", ",".join(metrics)),
        *("--kernel-name-base", "mangled", "--kernel-name", f"regex:{OUR_KERNELS}"),
        *("--csv", "--print-units", "base"),
    ]


def known(program: str, chip: str) -> tuple[str, ...]:
    """Those of METRICS that this ncu has for the chip (such as gh100); all if it does not say."""
    command = [program, "--query-metrics", "--chips", chip]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return METRICS
    names = set(re.findall(r"^\s*(\w+__\w+)", done.stdout, re.MULTILINE))
    if done.returncode != 0 or not names:
        return METRICS
    is_asked_elsewhere = "launch__"  # facts of the launch, which that list does not name
    return tuple(
        metric
        for metric in METRICS
        if metric.split(".")[0] in names or metric.startswith(is_asked_elsewhere)
    )


def choices(program: str, capability: str) -> Iterator[tuple[str, ...]]:
    """Metrics to ask for, one choice after another, until ncu measures something."""
    yield METRICS
    yield known(program, chip(capability))
    yield SURE


def chip(capability: str) -> str:
    """NVIDIA's name of the chip, for ncu."""
    return {"8.0": "ga100", "8.6": "ga102", "8.9": "ad102", "9.0": "gh100", "10.0": "gb100"}.get(
        capability, "gb202"
    )


def parse(text: str) -> list[dict]:
    """[{"kernel": name, metric: number, ...}], one a launch, of what ncu printed with --csv.

    The table begins at a line that names its columns, behind lines of ncu's and of the program's.
    """
    start = re.search(r'^"ID",', text, re.MULTILINE)
    if start is None:
        return []
    launches: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO(text[start.start() :])):
        if not (row.get("ID") or "").isdecimal() or row.get("Metric Value") is None:
            continue  # what others print below it
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        launch[row["Metric Name"]] = _number(row["Metric Value"])
    return list(launches.values())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # such as n/a


def main() -> None:
    """One call of every op on the inputs of its first cell that carries a goal."""
    import torch

    from benchmarks import goals

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    cells = {case.op: case for case in reversed(goals.cases(args.device, args.tiny))}
    with torch.no_grad():
        for op in OPS:
            cells[op].ours(*cells[op].make())
            print(f"called {op}", flush=True)
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
