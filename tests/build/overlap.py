"""Whether a kernel that may begin early (csrc/vtp/dependent_launch.cuh) waits on every path of its
machine code before it writes and before it ends. Reads are left out: what may be read before the
wait, the emulator knows."""

from sass import Flow, Function, Instruction

AWAITS = "ACQBULK"  # griddepcontrol.wait
WRITES = {"ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UTMASTG"}
# The first of every call they are in, so launched plainly.
FIRST = {
    "attend",
    "list_tokens_kernel",
    "similarities",
    "products",
    "row_squares",
    "compact_rows_kernel",
    "compact_rows_in_place_kernel",
    "key_norms",
    "list_members",
    "probe",
}


def waits_for_others(function: Function) -> bool:
    return any(instruction.name == AWAITS for instruction in function.instructions)


def too_early(function: Function) -> list[Instruction]:
    """What ends the kernel, or writes global memory, where some path has not waited."""
    flow = Flow(function.instructions)
    found, seen, stack = [], set(), [function.instructions[0].address]
    while stack:
        address = stack.pop()
        if address in seen:
            continue
        seen.add(address)
        for instruction in flow.blocks[address]:
            if instruction.name == AWAITS and not instruction.predicate:
                break
            if instruction.name == "EXIT" or instruction.name in WRITES:
                found.append(instruction)
        else:
            stack += flow.successors[address]
    return found
