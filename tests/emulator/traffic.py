"""What the CUDA kernels ask of memory, counted on the emulator: no measurement, the same anywhere.

    python tests/emulator/traffic.py [--write]
    python tests/emulator/traffic.py --op select_topk --shape next --lines

compares what is counted now with the table in csrc/traffic.md, writes the table anew, or prints
the rows of an op or a shape and, with --lines, what its source lines ask for.
tests/emulator/traffic.cpp says what is modelled, and what is not. Inputs and the bound of bytes are
those of the benchmarks.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# For this script and the processes it starts.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case
from benchmarks.shapes import Shape, of_model
from emulator import build, serving

TABLE = build.ROOT / "csrc" / "traffic.md"
SECTOR = 32  # bytes
SHARED_LIMIT = 227 << 10  # bytes that a block may have on compute capability 9.0
MOST_OF_BOUND = 1.02
LEAST_EFFICIENCY = 0.95


# --- what is counted --------------------------------------------------------------------------

SHAPES = {"llava": "LLaVA-1.5-7B", "next": "LLaVA-NeXT-7B", "qwen": "Qwen2.5-VL-7B"}
CURVES = {"llava": (576, 64), "next": (2880, 320), "qwen": (10000, 1000)}  # tokens, k
MERGED = {"llava": (576, 30), "next": (2880, 160), "qwen": (7168, 100)}  # tokens, targets
KEEP = 9  # one row in so many


def shape(name: str, heads: int | None = None, visual: int | None = None) -> Shape:
    """One request in bfloat16 with 64 tokens of text; of fewer query heads, or visual tokens."""
    whole = of_model(SHAPES[name])
    visual, heads = visual or whole.visual, heads or whole.heads
    kv_heads = whole.kv_heads * heads // whole.heads
    less = f" with {heads} of {whole.heads} heads" if heads < whole.heads else ""
    less += f" and {visual} of {whole.visual} visual tokens" if visual < whole.visual else ""
    return dataclasses.replace(
        whole, name=whole.name + less, visual=visual, heads=heads, kv_heads=kv_heads
    )


def benchmark(op: str, *arguments) -> Case:
    return importlib.import_module(f"benchmarks.{op}").case(*arguments, "cpu")


def compact_kv_in_place(of: Shape) -> Case:
    """As out of place; rows that stay where they are need not be moved."""
    case = benchmark("compact_kv", of, KEEP)
    inputs = case.make()
    indices = inputs[2]
    slots = indices.shape[1]
    moved = (indices != torch.arange(slots)).sum().item()

    def ours(keys, values, indices):
        return vtp.compact_kv(keys, values, indices, in_place=True)

    return dataclasses.replace(
        case, make=lambda: inputs, ours=ours, bytes_moved=case.bytes_moved * moved // slots
    )


def passive_attention(name: str) -> Case:
    """Its work grows with the heads, and with the square of the tokens."""
    smaller = {"llava": (4, 576), "next": (1, 2880), "qwen": (7, 576)}
    return benchmark("passive_attention", shape(name, *smaller[name]))


# Tokens, channels and k: the work of select_diverse grows with the square of the tokens.
PAIRS = {"llava": (288, 128, 32), "next": (360, 128, 40), "qwen": (520, 64, 52)}


def select_diverse(name: str, rule: str) -> Case:
    return benchmark("select_diverse", 1, *PAIRS[name], rule, torch.bfloat16)


# The cases of a shape, by op.
CASES: dict[str, Callable[[str], Case]] = {
    "assign_rows": lambda name: benchmark("assign_rows", 1, *MERGED[name], 64, torch.bfloat16),
    "attention_scores": lambda name: benchmark("attention_scores", shape(name), 1),
    "attention_scores, 32 rows": lambda name: benchmark(
        "attention_scores", shape(name, heads={"qwen": 7}.get(name, 8)), 32
    ),
    "attention_topk": lambda name: benchmark("attention_topk", shape(name)),
    "cls_inflection": lambda name: benchmark(
        "cls_inflection", 1, shape(name).visual, torch.bfloat16
    ),
    "compact_kv": lambda name: benchmark("compact_kv", shape(name), KEEP),
    "compact_kv in place": lambda name: compact_kv_in_place(shape(name)),
    "compact_rows": lambda name: benchmark("compact_rows", shape(name), KEEP),
    "inflection": lambda name: benchmark("inflection", 1, CURVES[name][0]),
    "merge_rows": lambda name: benchmark("merge_rows", 1, *MERGED[name], 1024, torch.bfloat16),
    "passive_attention": passive_attention,
    "select_diverse": lambda name: select_diverse(name, "maxmin"),
    "select_diverse, dpp": lambda name: select_diverse(name, "dpp"),
    "select_topk": lambda name: benchmark("select_topk", 1, *CURVES[name]),
    "token_contribution": lambda name: benchmark("token_contribution", shape(name)),
}
LONGEST = "passive_attention"  # to run


# --- counting ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Requests:
    """The requests of one kind that one place in the code made; see traffic.h."""

    place: int
    access: str  # "load", "store" or "atomic"
    shared: bool
    bytes: int  # of a lane
    count: int
    lanes: int
    units: int  # sectors or, in shared memory, passes
    ideal: int
    most: int
    source: str = ""


@dataclasses.dataclass
class Launch:
    """Of global memory in sectors; see traffic.h."""

    name: str
    blocks: int
    threads: int
    cold_reads: int
    first_writes: int
    passed_on: int
    block_reads: int
    barriers: int
    collectives: int
    load_phases: int
    requests: list[Requests]

    def sum(self, field: str, accesses: Iterable[str], shared: bool) -> int:
        return sum(
            getattr(x, field) for x in self.requests if x.shared == shared and x.access in accesses
        )

    def efficiency(self, access: str) -> float:
        """Of its requests to global memory: sectors that would do, of those that are asked for."""
        units = self.sum("units", [access], False)
        return self.sum("ideal", [access], False) / units if units else 1.0


@dataclasses.dataclass
class Counted:
    """One call of an op."""

    op: str
    shape: str
    text: str  # of the case
    bound: int
    launches: list[Launch]


def counter():
    """The build that counts. Whoever holds it can load no other."""
    kernels = build.load("traffic")
    kernels.set_order("forward")
    kernels.set_shared_limit(SHARED_LIMIT)
    return kernels


def taken(kernels) -> list[Launch]:
    return [
        Launch(**{**launch, "requests": [Requests(**x) for x in launch["requests"]]})
        for launch in kernels.take_traffic()
    ]


def with_sources(launches: list[Launch], kernels, most: int = 12) -> list[Launch]:
    """Source lines of those requests that ask most of global and of shared memory."""
    source = functools.cache(kernels.source)
    for launch in launches:
        for shared in (False, True):
            requests = [x for x in launch.requests if x.shared == shared]
            for x in sorted(requests, key=lambda x: -x.units)[:most]:
                x.source = source(x.place).replace(f"{build.ROOT}/", "")
    return launches


def count(op: str, name: str, lines: bool = False) -> Counted:
    kernels = counter()
    torch.manual_seed(0)
    case = CASES[op](name)
    inputs = case.make()
    taken(kernels)
    with serving.serving(variant="traffic"), torch.no_grad():
        case.ours(*inputs)
    launches = taken(kernels)
    if lines:
        launches = with_sources(launches, kernels)
    return Counted(op, name, case.shape, case.bytes_moved, launches)


def planted(name: str, arguments: tuple = (), order: str = "forward") -> list[Launch]:
    """What a kernel of requests.cpp asks for."""
    kernels = counter()
    kernels.set_order(order)
    getattr(kernels.requests, name)(*arguments)
    return taken(kernels)


def prepare_worker() -> None:
    """Inputs must have the same bits everywhere: torch's vector instructions differ in rounding."""
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
    os.environ.pop("VTP_BACKEND", None)
    torch.set_num_threads(1)
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"


@contextlib.contextmanager
def workers(number: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that count; this one can go on to load other builds."""
    build.build("traffic")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        number or os.cpu_count() or 1, mp_context=context, initializer=prepare_worker
    ) as pool:
        yield pool


def count_all(
    ops: Iterable[str] = CASES, names: Iterable[str] = SHAPES, lines: bool = False
) -> list[Counted]:
    ops, names = list(ops), list(names)
    with workers() as pool:
        order = sorted(((op, name) for op in ops for name in names), key=lambda x: x[0] != LONGEST)
        futures = {key: pool.submit(count, *key, lines) for key in order}
        return [futures[op, name].result() for op in ops for name in names]


# --- limits -----------------------------------------------------------------------------------

Breach = tuple[str, str, str]  # op, launch or "all", and what: "bytes", "loads" or "stores"

LOGITS = (
    "logits, 4 bytes a head and token, pass from launch to launch, and with them statistics or "
    "partial outputs of every tile of keys; where seven heads share a key, a ninth of the keys"
)
PARTS = "statistics of rows and columns of weights of every tile of keys pass from launch to launch"
CHOSEN = (
    "a warp writes those of 32 tokens that are chosen side by side, wherever in a sector they begin"
)
MEMBERS = (
    "rows are listed by group: those of a warp go to as many places; the lists are below 1 % of "
    "the bytes of the op"
)
MATRIX = "products of all pairs of tokens pass from launch to launch, and come back as cosines"
LISTS = "a thread lists eight neighbouring tokens; the lists are below 2 % of the bytes of the op"

# What passes the limits, in any shape, and why it may.
EXCEPTIONS: dict[Breach, str] = {
    ("attention_scores", "all", "bytes"): LOGITS,
    ("attention_scores, 32 rows", "all", "bytes"): PARTS,
    ("attention_topk", "all", "bytes"): LOGITS,
    ("attention_topk", "attention_topk in clusters", "stores"): CHOSEN,
    ("inflection", "inflection", "stores"): CHOSEN,
    ("inflection", "inflection: long", "stores"): CHOSEN,
    ("merge_rows", "merge_rows lists", "stores"): MEMBERS,
    ("passive_attention", "passive_attention lists", "stores"): LISTS,
    ("select_diverse", "all", "bytes"): MATRIX,
    ("select_diverse, dpp", "all", "bytes"): MATRIX,
    ("select_topk", "select_topk", "stores"): CHOSEN,
    ("select_topk", "select_topk in clusters", "stores"): CHOSEN,
    ("token_contribution", "all", "bytes"): LOGITS,
}


def breaches(counted: Iterable[Counted]) -> dict[Breach, list[str]]:
    """What passes the limits, and in which shapes by how much."""
    found = defaultdict(list)
    for call in counted:
        share = sum(map(dram, call.launches)) / call.bound
        if share > MOST_OF_BOUND:
            found[call.op, "all", "bytes"].append(f"{call.shape} {share:.3f} of the bound")
        for launch in call.launches:
            for access in ("load", "store"):
                efficiency = launch.efficiency(access)
                if efficiency < LEAST_EFFICIENCY:
                    words = f"{call.shape} {100 * efficiency:.1f} % of the sectors do"
                    found[call.op, launch.name, f"{access}s"].append(words)
    return found


def complaints(counted: Iterable[Counted], exceptions: dict[Breach, str]) -> Iterator[str]:
    """Breaches that nothing excuses, excuses that nothing needs."""
    found = breaches(counted)
    for breach in found.keys() - exceptions.keys():
        yield f"{': '.join(breach)}: {', '.join(found[breach])}"
    for breach in exceptions.keys() - found.keys():
        yield f"{': '.join(breach)}: within the limits, the exception can go"


# --- the table --------------------------------------------------------------------------------

HEADING = f"""# What the kernels ask of memory

Counted on the emulator, not measured: `tests/emulator/traffic.cpp` says what is modelled and what
is not. `tests/emulator/test_traffic.py` compares this table with what is counted now;
`python tests/emulator/traffic.py --write` writes it anew, and with `--op <op> --shape <shape>
--lines` it tells what each source line asks for.

One request in bfloat16 with 64 tokens of text, inputs of the benchmarks, on compute capability 9.0.
KB are 1000 bytes.

* DRAM: sectors of {SECTOR} bytes that no launch of the call touched before (read), or wrote. "Of
  bound": both, of the bytes that the op must move at least, `bytes_moved` of `benchmarks/<op>.py`.
* L2: what blocks read, each sector once a block; what warps read, as if there were no L1; what
  they write.
* Sectors: how many would do, of those that warps ask for: loads / stores.
* Shared passes: of a block / how many would do without bank conflicts.
* Lanes: how many of a warp take part in a request, on average: global / shared memory.
* Barriers: of a block. Collectives: shuffles and votes of a warp.
* Load phases: stretches between two of these in which a warp loads from global memory, of the warp
  that has most.

Limits: {MOST_OF_BOUND} of the bound, {LEAST_EFFICIENCY:.0%} of the sectors. What is beyond them is
named with its reason.
"""
COLUMNS = (
    *("shape", "launch", "blocks", "DRAM read, KB", "DRAM written, KB", "of bound"),
    *("L2 read, KB", "without L1, KB", "L2 written, KB", "sectors, %", "shared passes", "lanes"),
    *("barriers", "collectives", "load phases"),
)
ANY = ("load", "store", "atomic")


def dram(launch: Launch) -> int:
    return SECTOR * (launch.cold_reads + launch.first_writes)


def kilobytes(sectors: int) -> str:
    return f"{SECTOR * sectors / 1000:.1f}"


def per(total: int, count: int) -> str:
    """A mean, without needless decimals."""
    return f"{total / count:.1f}".removesuffix(".0") if count else "-"


def percent(launch: Launch, access: str) -> str:
    used = launch.sum("units", [access], False)
    return f"{100 * launch.efficiency(access):.1f}".removesuffix(".0") if used else "-"


def lanes(launch: Launch, shared: bool) -> str:
    return per(launch.sum("lanes", ANY, shared), launch.sum("count", ANY, shared))


def cells(call: Counted, number: int, launch: Launch) -> list[str]:
    warps = launch.blocks * -(-launch.threads // 32)
    passes, ideal = (launch.sum(field, ANY, True) for field in ("units", "ideal"))
    return [
        call.shape,
        f"{number} {launch.name}",
        f"{launch.blocks} x {launch.threads}",
        kilobytes(launch.cold_reads),
        kilobytes(launch.first_writes),
        f"{dram(launch) / call.bound:.3f}",
        kilobytes(launch.block_reads),
        kilobytes(launch.sum("units", ["load"], False)),
        kilobytes(launch.sum("units", ["store"], False)),
        f"{percent(launch, 'load')} / {percent(launch, 'store')}",
        f"{per(passes, launch.blocks)} / {per(ideal, launch.blocks)}" if passes else "-",
        f"{lanes(launch, False)} / {lanes(launch, True)}",
        per(launch.barriers, launch.blocks),
        per(launch.collectives, warps),
        str(launch.load_phases),
    ]


def total_cells(call: Counted) -> list[str]:
    reads, writes = (
        sum(getattr(launch, field) for launch in call.launches)
        for field in ("cold_reads", "first_writes")
    )
    share = f"{sum(map(dram, call.launches)) / call.bound:.3f}"
    return [call.shape, "all", "", kilobytes(reads), kilobytes(writes), share, *[""] * 9]


def table_lines(rows: Iterable[Iterable[str]]) -> Iterator[str]:
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        yield "| " + " | ".join(row) + " |"


def section(op: str, calls: list[Counted]) -> Iterator[str]:
    yield f"\n## {op}\n"
    for call in calls:
        yield f"* {call.shape}: {call.text}; bound {call.bound / 1000:.1f} KB"
    excused = [(launch, what, why) for (of, launch, what), why in EXCEPTIONS.items() if of == op]
    if excused:
        yield "\nBeyond the limits:\n"
        for launch, what, reason in excused:
            yield f"* {what} of {'all launches' if launch == 'all' else launch}: {reason}."
    yield ""
    rows = []
    for call in calls:
        rows += [cells(call, i, launch) for i, launch in enumerate(call.launches, 1)]
        if len(call.launches) > 1:
            rows.append(total_cells(call))
    yield from table_lines(rows)


def render(counted: list[Counted], compiler: str) -> str:
    lines = [HEADING, f"g++ {compiler}"]
    for op in dict.fromkeys(call.op for call in counted):
        lines += section(op, [call for call in counted if call.op == op])
    return "\n".join(lines) + "\n"


Table = dict[tuple[str, str, str], dict[str, str]]  # by op, shape and launch: cells by column


def read_table(text: str) -> tuple[str, Table]:
    """The compiler's version, and the cells."""
    op, table = "", {}
    for line in text.splitlines():
        if line.startswith("## "):
            op = line[3:]
        elif line.startswith("| ") and not line.startswith(("| shape", "| ---")):
            row = dict(
                zip(COLUMNS, map(str.strip, line.strip().strip("|").split("|")), strict=True)
            )
            table[op, row["shape"], row["launch"]] = row
    return re.search(r"^g\+\+ (\S+)$", text, re.MULTILINE)[1], table


def compiler() -> str:
    command = [build.find_tool("g++"), "-dumpfullversion"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def differences(now: str, then: str) -> Iterator[str]:
    """Where two tables differ. Another g++ may put code elsewhere: then 2 percent do not count."""
    (compiler_now, rows_now), (compiler_then, rows_then) = read_table(now), read_table(then)
    exactly = compiler_now == compiler_then

    def agree(one: str, other: str) -> bool:
        if exactly or one == other:
            return one == other
        number = r"\d+(?:\.\d+)?"
        pairs = zip(re.findall(number, one), re.findall(number, other), strict=False)
        return re.sub(number, "", one) == re.sub(number, "", other) and all(
            abs(float(a) - float(b)) <= 0.02 * float(b) for a, b in pairs
        )

    for key in rows_now.keys() | rows_then.keys():
        name = ", ".join(key)
        if key not in rows_then:
            yield f"{name}: is not in the table"
        elif key not in rows_now:
            yield f"{name}: is in the table, but was not counted"
        else:
            for column, cell in rows_now[key].items():
                if not agree(cell, rows_then[key][column]):
                    yield f"{name}: {column} {cell}, in the table {rows_then[key][column]}"


# --- what is printed --------------------------------------------------------------------------


def request_lines(launch: Launch, shared: bool) -> Iterator[str]:
    warps = launch.blocks * -(-launch.threads // 32)
    unit = "passes" if shared else "sectors"
    for x in sorted(launch.requests, key=lambda x: -x.units):
        if x.shared == shared and x.source:
            yield (
                f"    {'shared' if shared else 'global'} {x.access:6} {x.bytes:2} B: "
                f"{x.count / warps:8.2f} a warp, {x.lanes / x.count:4.1f} lanes, "
                f"{x.units / x.count:5.2f} {unit} (ideal {x.ideal / x.count:5.2f}, most {x.most}) "
                f"{x.source}"
            )


def print_calls(counted: list[Counted], lines: bool) -> None:
    for op in dict.fromkeys(call.op for call in counted):
        calls = [call for call in counted if call.op == op]
        print("\n".join(section(op, calls)))
        for call in calls if lines else []:
            for number, launch in enumerate(call.launches, 1):
                print(f"\n{call.shape}, {number} {launch.name}")
                for shared in (False, True):
                    print("\n".join(request_lines(launch, shared)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write csrc/traffic.md")
    parser.add_argument("--op", action="append", choices=CASES, help="print this op's rows")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="print this shape's rows")
    parser.add_argument("--lines", action="store_true", help="what source lines ask for, too")
    options = parser.parse_args(arguments)
    if reason := serving.why_not():
        parser.error(reason)
    if options.op or options.shape or options.lines:
        counted = count_all(options.op or CASES, options.shape or SHAPES, options.lines)
        print_calls(counted, options.lines)
        return 0
    counted = count_all()
    text = render(counted, compiler())
    if options.write:
        TABLE.write_text(text)
    wrong = [*complaints(counted, EXCEPTIONS), *differences(text, TABLE.read_text())]
    print("\n".join(sorted(wrong)) or f"{len(counted)} calls as in {TABLE.name}, within the limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
