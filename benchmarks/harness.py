"""Times an op beside what a user would write instead, on the same inputs, in the same run.

A benchmark file holds one `cases()`. Every case is first checked: op and rivals must agree on the
very inputs that are timed. Inputs rotate, so that no cache is measured; op and rivals take turns,
so that a machine that slows down slows all of them down. Ratios are medians over the turns. With
`compiled`, torch.compile's version of the first rival, made for the very shape, is one more rival.

On a GPU a turn is one replay of a CUDA graph of many calls, between two events: what the device
does, without the host's time to launch it. What waits for the device cannot be captured: it is
timed call by call, between events too, and marked.

Rivals from packages that some machines have (`guests`) are no part of what is promised: one that
fails, or finds something else, is left out of its cell, which says why.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.files import write_json
from vtp_kernels.machine import describe

ROTATION_BYTES = 96 * 2**20  # more than the last-level cache of the machines this runs on
MOST_SETS = 16
MOST_CALLS = 200  # in a turn
TURN_SECONDS = 0.02  # a turn repeats a call until it takes this long, or the clock is what is timed
COMPILED = "torch.compile"  # the name of that rival


@dataclass(frozen=True)
class Goal:
    """What an op is to reach on an H200: at most so many microseconds, or so much of a copy."""

    microseconds: float | None = None
    share_of_copy: float | None = None

    def __str__(self) -> str:
        if self.microseconds is not None:
            return f"<= {self.microseconds:g} us"
        return f">= {100 * self.share_of_copy:g} % of copy"

    def is_met(self, microseconds: float, share_of_copy: float) -> bool:
        if self.microseconds is not None:
            return microseconds <= self.microseconds
        return share_of_copy >= self.share_of_copy


@dataclass(frozen=True)
class Case:
    """One cell of a table.

    Attributes:
        op, shape: names of the row.
        bytes_moved: lower bound of what the op must read and write: what it needs of its inputs and
            all its outputs, each once. Masks, counts and what else is small beside them may be left
            out; tests/emulator/traffic.py holds kernels to within 2 percent of it.
        make: draws one set of inputs.
        ours: calls the op on a set.
        rivals: label -> the same job without this package.
        check: raises if the op's result and a rival's differ.
        guests: rivals from other packages; one that fails or differs is left out.
        goal: what the op is to reach there, if anything was promised.
    """

    op: str
    shape: str
    bytes_moved: int
    make: Callable[[], tuple]
    ours: Callable[..., object]
    rivals: dict[str, Callable[..., object]]
    check: Callable[[object, object], None]
    guests: dict[str, Callable[..., object]] = field(default_factory=dict)
    goal: Goal | None = None


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
    left_out: dict[str, str] = field(default_factory=dict)  # guest -> why it is no rival here
    goal: str | None = None
    goal_met: bool | None = None


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


def launch_gap(device: str) -> float:
    """Seconds from one launch to the next in a chain of kernels that do nothing to speak of: what
    a launch costs in a CUDA graph. On a CPU, what a call of torch costs."""
    number = torch.zeros(1, device=device)
    take, _ = _turn(lambda: number.add_(1), [()], device)
    return statistics.median(take() for _ in range(5))


def _with_compiled(case: Case) -> Case:
    torch._dynamo.reset()  # or, after some shapes, what is called compiled would run eagerly
    first = next(iter(case.rivals.values()))
    compiled = torch.compile(first, dynamic=False)
    return replace(case, rivals={**case.rivals, COMPILED: compiled})


@torch.no_grad()
def measure(
    case: Case,
    device: str,
    turns: int,
    bandwidth: float,
    compiled: bool = False,
    alone: bool = False,
) -> Timing:
    """Times one case; `bandwidth` is that of a copy in this run (`copy_bandwidth`). `alone`: rivals
    check what it finds, and are not timed."""
    if compiled:
        case = _with_compiled(case)
    first = case.make()
    size = sum(_bytes(x) for x in first)
    rotation = _rotation_bytes(device)
    sets = [first] + [
        case.make() for _ in range(min(MOST_SETS, max(1, rotation // max(size, 1))) - 1)
    ]
    for inputs in sets:
        ours = case.ours(*inputs)
        for rival in case.rivals.values():
            case.check(ours, rival(*inputs))
    calls = {"ours": case.ours} | ({} if alone else case.rivals)
    take = {name: _turn(call, sets, device) for name, call in calls.items()}
    guests, left_out = ({}, {}) if alone else _welcome(case, sets, device)
    take |= guests
    seconds: dict[str, list[float]] = {name: [] for name in take}
    for _ in range(turns):
        for name, (turn, _) in take.items():
            seconds[name].append(turn())
    ours = statistics.median(seconds["ours"])
    ratios = {
        name: sorted(r / o for r, o in zip(seconds[name], seconds["ours"], strict=True))
        for name in take
        if name != "ours"
    }
    rate = case.bytes_moved / ours
    goal = case.goal if _is_cuda(device) else None
    return Timing(
        case.op,
        case.shape,
        1e6 * ours,
        rate / 1e9,
        rate / bandwidth,
        {name: statistics.median(values) for name, values in ratios.items()},
        {name: (values[0], values[-1]) for name, values in ratios.items()},
        [name for name, (_, captured) in take.items() if _is_cuda(device) and not captured],
        left_out,
        goal=str(goal) if goal else None,
        goal_met=goal.is_met(1e6 * ours, rate / bandwidth) if goal else None,
    )


def _welcome(case: Case, sets: list[tuple], device: str) -> tuple[dict, dict[str, str]]:
    """(the turns of the guests that find what the op finds, why others do not take part)."""
    guests, left_out = {}, {}
    for name, guest in case.guests.items():
        try:
            for inputs in sets:
                case.check(case.ours(*inputs), guest(*inputs))
            guests[name] = _turn(guest, sets, device)
        except Exception as error:  # whatever another package raises
            left_out[name] = f"{type(error).__name__}: {error}"[:500]
    return guests, left_out


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
        others = dict.fromkeys(name for row in rows for name in row.speedup if name != COMPILED)
        best = [min(v for name, v in row.speedup.items() if name != COMPILED) for row in rows]
        line = [f"`{op}`", str(len(rows)), *_mean_and_range(best), ", ".join(others)]
        if compiled:
            line += _mean_and_range([row.speedup[COMPILED] for row in rows])
        table.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _mean_and_range(ratios: list[float]) -> tuple[str, str]:
    return f"{statistics.geometric_mean(ratios):.1f}", f"{min(ratios):.2f} to {max(ratios):.1f}"


def write(path: Path, result: dict) -> None:
    """A result file: what was found, with the machine, the versions and the commit."""
    write_json(path, {**result, **describe()})


def assert_equal(ours, theirs) -> None:
    """For ops that choose or move rows: what they return must be the same, not close."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


NEAR = 1e-5  # of a score, as in the tests of attention_scores


def assert_same_choice(ours: tuple, theirs: tuple) -> None:
    """(indices [B, k], scores [B, N]) twice, whose scores were rounded differently: the scores are
    near, and so to the k-th is that of every row that only one side has chosen."""
    (chosen, scores), (others, known) = ours, theirs
    torch.testing.assert_close(scores, known, rtol=NEAR, atol=1e-12)
    mine, rival = (torch.zeros_like(known, dtype=torch.bool) for _ in range(2))
    mine.scatter_(1, chosen, True)
    rival.scatter_(1, others, True)
    assert torch.equal(mine.sum(1), rival.sum(1)), "another number of rows"
    cut = known.gather(1, others).amin(1, keepdim=True)
    far = (mine ^ rival) & ((known - cut).abs() > 2 * NEAR * cut.abs())
    assert not far.any(), f"another choice, and no near-tie: {far.nonzero()[:8].tolist()}"


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
        if t.goal is not None:
            rivals += f"; goal {t.goal}{': met' if t.goal_met else ': missed'}"
        lines.append(
            f"| {t.op} | {t.shape} | {t.microseconds:,.0f} us | {t.gigabytes_per_second:.1f} "
            f"| {100 * t.share_of_copy:.0f} % | {rivals} |"
        )
    return "\n".join(lines)
