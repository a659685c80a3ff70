"""Reads machine code as cuobjdump prints it: instructions, scoreboards, branches and loops."""

import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

# --- cuobjdump --------------------------------------------------------------------------------


@functools.cache
def disassembler(tool: str = "cuobjdump") -> str | None:
    """cuobjdump, or nvdisasm, of the toolkit or the one that triton brings."""
    if found := shutil.which(tool):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None:
        return None
    folder = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    return shutil.which(str(folder / tool))


def disassembled(file: Path, arch: str | None = None) -> Iterator["Function"]:
    """The functions of an object file or a cubin, of every architecture or of one, such as 9.0."""
    chosen = ["-arch", f"sm_{arch.replace('.', '')}"] if arch else []
    command = [disassembler(), *chosen, "-sass", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from functions(process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"cuobjdump fails on {file}")


def dotted(number: str) -> str:
    """sm_120 as 12.0, sm_90a as 9.0a."""
    return re.sub(r"(\d)([a-z]?)$", r".\1\2", number.removeprefix("sm_"))


# --- instructions -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    predicate: str | None
    name: str
    modifiers: str  # of LDG.E.64: .E.64
    operands: str
    control: int  # the upper word of its encoding, in which the scoreboards are

    def __str__(self) -> str:
        return " ".join(filter(None, (self.predicate, self.opcode, self.operands)))

    @property
    def opcode(self) -> str:
        return self.name + self.modifiers

    @property
    def scoreboard(self) -> int | None:
        """The one that counts until its result is written. (That of bits 49-51 counts until its
        operands are read, which is soon.)"""
        number = self.control >> 46 & 7
        return number if number < 6 else None

    @property
    def awaited(self) -> int:
        """A bit for each scoreboard that must be at zero before it is issued, whatever its
        predicate says."""
        return self.control >> 52 & 63


@dataclasses.dataclass(frozen=True)
class Function:
    arch: str
    name: str  # mangled
    instructions: list[Instruction]


INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?"  # address
    r"(?:(@\S+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*([^;/]*?)\s*;?\s*\}?\s*/\* 0x[0-9a-f]{16} \*/"
)
CONTROL = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
FUNCTION = re.compile(r"\s*Function : (\S+)")
CODE = re.compile(r"\s*code for sm_(\w+)")


def functions(listing: Iterable[str]) -> Iterator[Function]:
    arch, current, waiting = "", None, None
    for line in listing:
        if waiting and (match := CONTROL.match(line)):
            address, *parts = waiting
            if int(address, 16) != 16 * len(current.instructions):
                raise ValueError(f"what comes before {address} in {current.name} cannot be read")
            current.instructions.append(Instruction(int(address, 16), *parts, int(match[1], 16)))
            waiting = None
        elif match := INSTRUCTION.match(line):
            waiting = match.groups()
        elif match := FUNCTION.match(line):
            if current:
                yield current
            current = Function(arch, match[1], [])
        elif match := CODE.match(line):
            arch = dotted(match[1])
    if current:
        yield current


# --- flow -------------------------------------------------------------------------------------

# Where these lead is in a register, so that the paths through a function are not known.
UNKNOWN_TARGET = {"BRX", "BRXU", "JMX", "JMXU", "JMP"}


class Flow:
    """The basic blocks of a function that a path from its start reaches, and its loops.

    A call leads to what it calls and, as if nothing happened there, to what follows it. What only a
    warp that fell apart runs, behind BRA.DIV, is left out.

    Attributes:
        reached: addresses of all instructions to which a path leads, behind BRA.DIV too.
        blocks: address of the first instruction -> the block's instructions, in order of address.
        successors: address of a block -> addresses of those that may follow.
        loops: address of a loop's head -> addresses of its blocks, with those of loops inside it.
        once: the successors where each loop is left after one iteration: no path comes back.
        order: addresses of the blocks, each behind those that lead to it in `once`.
        latches: address of a loop's head -> addresses of the blocks that lead back to it.
    """

    def __init__(self, instructions: list[Instruction]):
        self._instructions = instructions
        self._joins: dict[str, set[int]] = {}  # barrier register -> where it lets a warp continue
        for instruction in instructions:
            if instruction.name == "BSSY":
                register, target = instruction.operands.split(", ")
                self._joins.setdefault(register, set()).add(int(target, 16))
        starts = {instructions[0].address}
        for i, instruction in enumerate(instructions):
            leads, after = self._leads_to(i), [x.address for x in instructions[i + 1 : i + 2]]
            if ".DIV" in instruction.modifiers:
                starts.update([int(instruction.operands.split(", ")[-1], 16), *after])
            elif leads != after:
                starts.update(leads + after)
        every = {}
        for i, instruction in enumerate(instructions):
            if instruction.address in starts:
                block = every[instruction.address] = []
            block.append((i, instruction))
        leads = {address: self._leads_to(block[-1][0]) for address, block in every.items()}
        self.reached = self._reached(every, leads)
        order = _depth_first(leads, instructions[0].address)
        self.blocks = {a: [x for _, x in every[a]] for a in sorted(order)}
        self.successors = {address: leads[address] for address in self.blocks}
        self.loops = _natural_loops(self.successors, order)
        self._unroll(instructions[0].address)

    def _reached(self, blocks: dict, leads: dict[int, list[int]]) -> set[int]:
        leads = dict(leads)
        for address, block in blocks.items():
            if ".DIV" in (last := block[-1][1]).modifiers:
                leads[address] = [int(last.operands.split(", ")[-1], 16), *leads[address]]
        order = _depth_first(leads, self._instructions[0].address)
        return {x.address for address in order for _, x in blocks[address]}

    def _unroll(self, start: int) -> None:
        once = {address: list(leads) for address, leads in self.successors.items()}
        self.latches = {}
        for head, body in sorted(self.loops.items(), key=lambda loop: len(loop[1])):
            leaves = {to for block in body for to in once[block]} - body
            self.latches[head] = [block for block in body if head in once[block]]
            for latch in self.latches[head]:
                once[latch] = sorted({*once[latch], *leaves} - {head})
        self.order = _depth_first(once, start)
        place = {address: i for i, address in enumerate(self.order)}
        self.once = {x: [to for to in once[x] if place[to] > place[x]] for x in self.order}

    def _leads_to(self, i: int) -> list[int]:
        """Addresses of the instructions that may follow the i-th."""
        instruction = self._instructions[i]
        after = [x.address for x in self._instructions[i + 1 : i + 2]]
        if instruction.name in UNKNOWN_TARGET:
            raise ValueError(
                f"{instruction} at {instruction.address:x}: where it leads is not known"
            )
        if instruction.name in ("EXIT", "RET", "KILL"):
            return after if instruction.predicate else []
        if instruction.name == "BSYNC" and self._joins.get(instruction.operands, set()).isdisjoint(
            after
        ):
            raise ValueError(f"BSYNC at {instruction.address:x} is not where its BSSY says")
        if instruction.name == "CALL":
            return [int(instruction.operands, 16), *after]
        if instruction.name != "BRA" or ".DIV" in instruction.modifiers:
            return after
        *condition, target = instruction.operands.split(", ")
        target = int(target, 16)
        return [target, *after] if instruction.predicate or condition else [target]

    def called(self) -> list[Instruction]:
        """The instructions of what is called and comes back."""
        calls = {a: block[-1] for a, block in self.blocks.items() if block[-1].name == "CALL"}
        targets = {address: int(call.operands, 16) for address, call in calls.items()}
        within = {
            address: [to for to in leads if to != targets.get(address)]
            for address, leads in self.successors.items()
        }
        found = set()
        for target in targets.values():
            reached = _depth_first(within, target)
            if any(self.blocks[address][-1].name == "RET" for address in reached):
                found.update(reached)
        return [x for address in found for x in self.blocks[address]]


def _depth_first(successors: dict[int, list[int]], start: int) -> list[int]:
    """What is reached from `start`, each before all that is reached through it alone."""
    finished, seen, stack = [], {start}, [(start, iter(successors[start]))]
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(successors[following])))
                break
        else:
            finished.append(node)
            stack.pop()
    return finished[::-1]


def _natural_loops(successors: dict[int, list[int]], order: list[int]) -> dict[int, set[int]]:
    """A loop is an edge back to a block through which every path to the edge goes. A jump back from
    code that nvcc only moved out of the way is not one."""
    predecessors = {node: [] for node in order}
    for node in order:
        for following in successors[node]:
            predecessors[following].append(node)
    start, everything = order[0], set(order)
    dominators = {node: {start} if node == start else everything for node in order}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = set.intersection(*(dominators[before] for before in predecessors[node]))
            if (found := common | {node}) != dominators[node]:
                dominators[node], changed = found, True
    loops = {}
    for node in order:
        for head in successors[node]:
            if head in dominators[node]:
                body, stack = loops.setdefault(head, {head}), [node]
                while stack:
                    if (block := stack.pop()) not in body:
                        body.add(block)
                        stack += predecessors[block]
    return dict(sorted(loops.items()))
