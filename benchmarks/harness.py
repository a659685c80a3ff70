"""Times an op beside what a user would write instead, on the same inputs, in the same run.

A benchmark file holds one `cases()`. Every case is first checked: op and rivals must agree on the
very inputs that are timed. Inputs rotate, so that no cache is measured; op and rivals take turns,
so that a machine that slows down slows all of them down. Ratios are medians over the turns. With
`compiled`, torch.compile's version of the first rival, made for the very shape, is one more rival.

On a GPU a turn is one replay of a CUDA graph of many calls, between two events: what the device
does, without the host's time to launch it. What waits for the device cannot be captured: it is
timed call by call, between events too, and marked.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from vtp_kernels.machine import describe

ROTATION_BYTES = 96 * 2**20  # more than the last-level cache of the machines this runs on
MOST_SETS = 16
MOST_CALLS = 200  # in a turn
TURN_SECONDS = 0.02  # a turn repeats a call until it takes this long, or the clock is what is timed
COMPILED = "torch.compile"  # the name of that rival


@dataclass(frozen=True)
class Case:
    """One cell of a table.

    Attributes:
        op, shape: names of the row.
        bytes_moved: lower bound of what the op must read and write.
        make: draws one set of inputs.
        ours: calls the op on a set.
        rivals: label -> the same job without this package.
        check: raises if the op's result and a rival's differ.
    """

    op: str
    shape: str
    bytes_moved: int
    make: Callable[[], tuple]
    ours: Callable[..., object]
    rivals: dict[str, Callable[..., object]]
    check: Callable[[object, object], None]


@dataclass
class Timing:
    op: str
    shape: str
    microseconds: float
    gigabytes_per_second: float
    share_of_copy: float
    speedup: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    not_captured: list[str] = field(default_factory=list)


def copy_bandwidth(device: str) -> float:
    """Bytes per second that torch moves (reads plus writes) copying 256 MiB on this device."""
    source = torch.zeros(256 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if _is_cuda(device):
        take, _ = _turn(lambda: target.copy_(source), [()], device)
        seconds = [take() for _ in range(5)]
    else:
        seconds = [_seconds(lambda: target.copy_(source), device, 4) for _ in range(5)]
    return 2 * source.numel() / statistics.median(seconds[1:])


def measure(
    cases: Iterable[Case],
    device: str,
    turns: int,
    bandwidth: float | None = None,
    compiled: bool = False,
) -> list[Timing]:
    """Times every case; `bandwidth` is that of a copy in this run, measured here if not given."""
    bandwidth = bandwidth or copy_bandwidth(device)
    return [
        _measure(_with_compiled(case) if compiled else case, device, turns, bandwidth)
        for case in tqdm(list(cases), disable=None)
    ]


def _with_compiled(case: Case) -> Case:
    torch._dynamo.reset()  # or, after some shapes, what is called compiled would run eagerly
    first = next(iter(case.rivals.values()))
    compiled = torch.compile(first, dynamic=False)
    return replace(case, rivals={**case.rivals, COMPILED: compiled})


@torch.no_grad()
def _measure(case: Case, device: str, turns: int, bandwidth: float) -> Timing:
    first = case.make()
    size = sum(_bytes(x) for x in first)
    rotation = _rotation_bytes(device)
    sets = [first] + [
        case.make() for _ in range(min(MOST_SETS, max(1, rotation // max(size, 1))) - 1)
    ]
    for inputs in sets:
        for rival in case.rivals.values():
            case.check(case.ours(*inputs), rival(*inputs))
    calls = {"ours": case.ours, **case.rivals}
    take = {name: _turn(call, sets, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, (turn, _) in take.items():
            seconds[name].append(turn())
    ours = statistics.median(seconds["ours"])
    ratios = {
        name: sorted(r / o for r, o in zip(seconds[name], seconds["ours"], strict=True))
        for name in case.rivals
    }
    rate = case.bytes_moved / ours
    return Timing(
        case.op,
        case.shape,
        1e6 * ours,
        rate / 1e9,
        rate / bandwidth,
        {name: statistics.median(values) for name, values in ratios.items()},
        {name: (values[0], values[-1]) for name, values in ratios.items()},
        [name for name, (_, captured) in take.items() if _is_cuda(device) and not captured],
    )


def _turn(call, sets: list[tuple], device: str) -> tuple[Callable[[], float], bool]:
    """(what takes one turn and returns the seconds of one call, whether it replays a graph)."""
    if not _is_cuda(device):
        repeats = _repeats(call, sets, device)
        return lambda: _rotate(call, sets, device, repeats), False
    waits = _waits_for_the_device(call, sets[0])
    once = _between_events(lambda: call(*sets[-1]))
    calls = max(1, min(MOST_CALLS, round(TURN_SECONDS / max(once, 1e-6))))

    def all_calls() -> None:
        for i in range(calls):
            call(*sets[i % len(sets)])

    if waits:
        return lambda: _between_events(all_calls) / calls, False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    graph.replay()  # the first replay uploads the graph
    return lambda: _between_events(graph.replay) / calls, True


def _waits_for_the_device(call, inputs: tuple) -> bool:
    """Whether a call does, as one that reads a result on the host; also warms up."""
    call(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _between_events(work) -> float:
    """Seconds from the device's first to its last step of `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host gets ahead
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _rotation_bytes(device: str) -> int:
    """Bytes of inputs that no cache holds: on a GPU, four times what its L2 does."""
    if not _is_cuda(device):
        return ROTATION_BYTES
    return max(ROTATION_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _repeats(call, sets: list[tuple], device: str) -> int:
    _seconds(lambda: call(*sets[0]), device, 1)
    once = _seconds(lambda: call(*sets[-1]), device, 1)
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / max(once, 1e-6))))


def _rotate(call, sets: list[tuple], device: str, repeats: int) -> float:
    position = iter(range(repeats))
    return _seconds(lambda: call(*sets[next(position) % len(sets)]), device, repeats)


def _seconds(call, device: str, repeats: int) -> float:
    """Seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: str) -> None:
    if _is_cuda(device):
        torch.cuda.synchronize()


def _bytes(x) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    return sum(map(_bytes, x)) if isinstance(x, (list, tuple)) else 0


def summary(timings: list[Timing]) -> str:
    """One Markdown line an op, over its shapes: how many times faster than the best rival, and than
    torch.compile, which is set apart: it is made for one shape, and takes seconds to make."""
    compiled = all(COMPILED in timing.speedup for timing in timings)
    head = ["op", "shapes", "times faster, geometric mean", "slowest to fastest shape", "beside"]
    head += [f"than {COMPILED}", "slowest to fastest shape"] if compiled else []
    align = ["---", "---:", "---:", "---:", "---"] + (["---:", "---:"] if compiled else [])
    table = [head, align]
    by_op: dict[str, list[Timing]] = {}
    for timing in timings:
        by_op.setdefault(timing.op, []).append(timing)
    for op, rows in by_op.items():
        others = [name for name in rows[0].speedup if name != COMPILED]
        best = [min(row.speedup[name] for name in others) for row in rows]
        line = [f"`{op}`", str(len(rows)), *_mean_and_range(best), ", ".join(others)]
        if compiled:
            line += _mean_and_range([row.speedup[COMPILED] for row in rows])
        table.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _mean_and_range(ratios: list[float]) -> tuple[str, str]:
    return f"{statistics.geometric_mean(ratios):.1f}", f"{min(ratios):.2f} to {max(ratios):.1f}"


def write(path: Path, result: dict) -> None:
    """A result file: what was found, with the machine, the versions and the commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **describe()}, indent=2) + "\n")


def assert_equal(ours, theirs) -> None:
    """For ops that choose or move rows: what they return must be the same, not close."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def table(timings: list[Timing]) -> str:
    """The timings as a Markdown table."""
    lines = [
        "| op | shape | time | GB/s | of copy | times faster than |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for t in timings:
        rivals = ", ".join(
            f"{name} {ratio:.2f}" + (" (not captured)" if name in t.not_captured else "")
            for name, ratio in t.speedup.items()
        )
        lines.append(
            f"| {t.op} | {t.shape} | {t.microseconds:,.0f} us | {t.gigabytes_per_second:.1f} "
            f"| {100 * t.share_of_copy:.0f} % | {rivals} |"
        )
    return "\n".join(lines)
