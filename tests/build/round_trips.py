"""The round trips to memory that machine code waits for, and the issue slots of its loops.

A load off the SM sets a scoreboard; an instruction that waits for the scoreboard stands still until
the load is back. Loads that were on their way together come back together: a wait costs a round
trip only if it waits for a load that was issued after the last wait which did.

Of paths that part, the one with the most counts; each loop is gone through once. Not counted are
constants (LDC, ULDC), special registers (S2R), shared memory and stores. How much of a round trip
the work between a load and its wait hides is not known.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from sass import Flow, Instruction

# LD is a generic load, with which a cluster reads another block's shared memory too.
LOADS = {"LD", "LDG", "ATOM", "ATOMG"}
COPIES = {"LDGSTS", "LDGDEPBAR", "DEPBAR"}
BARRIERS = {"BAR", "UCGABAR_WAIT"}  # but for BAR.ARV, which does not wait
# Copies that something else than a scoreboard waits for, or that count differently.
UNKNOWN_LOADS = {"UBLKCP", "UBLKPF", "UTMALDG", "LDGMC", "TEX", "TLD", "TLD4", "SULD", "ARRIVES"}


@dataclasses.dataclass(frozen=True)
class State:
    """What is on its way at one point of a path.

    Attributes:
        boards: a bit for each scoreboard with a load issued since the last round trip.
        copies: whether a copy to shared memory (cp.async) issued since then is in no group yet.
        groups: of each group of copies, the oldest first: its scoreboard, whether such a copy is
            in it.
    """

    boards: int = 0
    copies: bool = False
    groups: tuple[tuple[int, bool], ...] = ()


def is_barrier(instruction: Instruction) -> bool:
    return instruction.name in BARRIERS and ".ARV" not in instruction.modifiers


def is_narrow(instruction: Instruction) -> bool:
    """Whether it loads 1 or 2 bytes."""
    return instruction.name in LOADS and bool(
        {"U8", "S8", "U16", "S16"} & set(instruction.modifiers.split("."))
    )


MOST_GROUPS = 8  # that a path remembers, of those that nothing waited for
DEPBAR = re.compile(r"SB(\d), (0x[0-9a-f]+)(?:, \{([\d,]+)\})?$")


def awaited(instruction: Instruction) -> list[tuple[int, int]]:
    """The scoreboards that an instruction waits for, each with how many may be left on it."""
    boards = [(board, 0) for board in range(6) if instruction.awaited >> board & 1]
    if instruction.name == "DEPBAR":
        match = DEPBAR.match(instruction.operands)
        if not match or instruction.modifiers != ".LE":
            raise ValueError(
                f"{instruction} at {instruction.address:x}: what it waits for is not known"
            )
        boards.append((int(match[1]), int(match[2], 16)))
        boards += [(int(board), 0) for board in (match[3] or "").split(",") if board]
    return boards


def step(state: State, instruction: Instruction) -> tuple[State, bool]:
    """The state behind an instruction, and whether the instruction waited for a round trip."""
    boards, copies, groups = state.boards, state.copies, state.groups
    exposed = False
    for board, left in awaited(instruction):
        if left == 0:
            exposed |= bool(boards >> board & 1)
            boards &= ~(1 << board)
        on_it = [i for i, group in enumerate(groups) if group[0] == board]
        done = on_it[: max(0, len(on_it) - left)]
        exposed |= any(groups[i][1] for i in done)
        groups = tuple(group for i, group in enumerate(groups) if i not in done)
    if exposed:  # all that was on its way is back too
        boards, copies, groups = 0, False, tuple((board, False) for board, _ in groups)
    if instruction.name in LOADS and instruction.scoreboard is not None:
        boards |= 1 << instruction.scoreboard
    elif instruction.name == "LDGSTS":
        copies = True
    elif instruction.name == "LDGDEPBAR":
        groups = (*groups, (instruction.scoreboard, copies))[-MOST_GROUPS:]
        copies = False
    return State(boards, copies, groups), exposed


# --- a kernel ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wait:
    """An instruction that waits for a round trip, and the loads that may be on their way then."""

    instruction: Instruction
    loads: list[Instruction]


@dataclasses.dataclass(frozen=True)
class Loop:
    address: int
    slots: int  # instructions of an iteration, of all its branches, without those of loops inside
    trips: float  # round trips that an iteration waits for, each loop inside gone through once

    def __str__(self) -> str:
        return f"{self.slots} ({self.trips:g})" if self.trips else f"{self.slots}"


@dataclasses.dataclass(frozen=True)
class RoundTrips:
    """What a kernel waits for.

    Attributes:
        first: round trips before the first barrier.
        trips: round trips from its start to its end.
        wide: as many, if loads of 1 or 2 bytes took no time: those of masks and rows not aligned.
    """

    first: int
    trips: int
    wide: int
    waits: list[Wait]
    loops: list[Loop]
    barriers: list[Instruction]

    @property
    def loads_per_wait(self) -> float:
        """0.0 where it waits for none."""
        return sum(len(wait.loads) for wait in self.waits) / max(1, len(self.waits))


def round_trips(instructions: list[Instruction]) -> RoundTrips:
    for instruction in instructions:
        if instruction.name in UNKNOWN_LOADS:
            raise ValueError(
                f"{instruction} at {instruction.address:x}: how it is waited for is not known here"
            )
    flow = Flow(instructions)
    events = {
        address: [x for x in block if x.awaited or x.name in LOADS | BARRIERS | COPIES]
        for address, block in flow.blocks.items()
    }
    without_narrow = {
        address: [dataclasses.replace(x, name="NOP") if is_narrow(x) else x for x in block]
        for address, block in events.items()
    }
    for x in instructions:
        if x.address not in flow.reached and x.name in LOADS | BARRIERS | COPIES:
            raise ValueError(f"{x} at {x.address:x}: no path from the start leads here")
    for x in flow.called():
        if x.name in LOADS | BARRIERS | COPIES:
            raise ValueError(f"{x} at {x.address:x}: what a called function waits for is not known")
    return RoundTrips(
        _most_trips(flow, events, is_barrier),
        _most_trips(flow, events, lambda _: False),
        _most_trips(flow, without_narrow, lambda _: False),
        _waits(flow, events),
        [_loop(flow, events, head) for head in flow.loops],
        [x for block in flow.blocks.values() for x in block if is_barrier(x)],
    )


Events = dict[int, list[Instruction]]  # address of a block -> those of its instructions that count
# The states in which a path may come to a point, each with the most round trips of such a path.
Paths = dict[State, int]


def _join(paths: Paths, more: Paths) -> None:
    for state, trips in more.items():
        paths[state] = max(trips, paths.get(state, 0))


def _through(block: Iterable[Instruction], paths: Paths) -> Paths:
    for instruction in block:
        behind: Paths = {}
        for state, trips in paths.items():
            following, exposed = step(state, instruction)
            _join(behind, {following: trips + exposed})
        paths = behind
    return paths


def _most_trips(flow: Flow, events: Events, ends: Callable[[Instruction], bool]) -> int:
    """On paths up to the first instruction that `ends` them, with what it waits for itself."""
    at = defaultdict(dict, {flow.order[0]: {State(): 0}})
    most = 0
    for address in flow.order:
        block = events[address]
        end = next((i for i, x in enumerate(block) if ends(x)), None)
        paths = _through(block if end is None else block[: end + 1], at[address])
        most = max(most, *paths.values(), 0)
        for following in flow.once[address] if end is None else ():
            _join(at[following], paths)
    return most


ITERATIONS = 6


def _loop(flow: Flow, events: Events, head: int) -> Loop:
    body = flow.loops[head]
    order = [address for address in flow.order if address in body]

    def iterate(paths: Paths) -> Paths:
        at = defaultdict(dict, {head: paths})
        for address in order:
            behind = _through(events[address], at[address])
            for following in flow.once[address]:
                if following in body:
                    _join(at[following], behind)
            at[address] = behind
        last: Paths = {}
        for latch in flow.latches[head]:
            _join(last, at[latch])
        return last

    paths = iterate({State(): 0})  # only now what one iteration leaves to the next is on its way
    if not paths:
        raise ValueError(f"the loop at {head:x} has a second way in")
    before = max(paths.values())
    for _ in range(ITERATIONS):
        paths = iterate(paths)
    trips = round((max(paths.values()) - before) / ITERATIONS, 2)
    inside = set().union(*(flow.loops[other] for other in flow.loops if other in body - {head}))
    slots = sum(len(flow.blocks[address]) for address in body - inside)
    return Loop(head, slots, trips)


def _waits(flow: Flow, events: Events) -> list[Wait]:
    start = flow.order[0]
    seen, todo = {(start, State())}, [(start, State())]
    exposed = {}  # address -> the instruction, where on some path it waits for a round trip
    while todo:
        address, state = todo.pop()
        for instruction in events[address]:
            state, waited = step(state, instruction)
            if waited:
                exposed[instruction.address] = instruction
        for following in flow.successors[address]:
            if (following, state) not in seen:
                seen.add((following, state))
                todo.append((following, state))

    def through(block: Iterable[Instruction], loads: frozenset) -> Iterator[tuple]:
        """Each instruction, with the loads on their way before it; last those behind the block."""
        for instruction in block:
            yield instruction, loads
            if instruction.address in exposed:
                loads = frozenset()
            if instruction.name in LOADS | {"LDGSTS"}:
                loads |= {instruction}
        yield None, loads

    before = {start: frozenset()}
    todo = [start]
    while todo:
        address = todo.pop()
        *_, (_, behind) = through(events[address], before[address])
        for following in flow.successors[address]:
            if following not in before or not behind <= before[following]:
                before[following] = before.get(following, frozenset()) | behind
                todo.append(following)
    return [
        Wait(instruction, sorted(loads, key=lambda load: load.address))
        for address, block in events.items()
        for instruction, loads in through(block, before[address])
        if instruction and instruction.address in exposed
    ]
