"""`python -m benchmarks.model`: what the time of each op is made of, beside its goal.

This is a model and not a measurement. A launch takes its place in the graph, then the round trips
to memory that a warp waits for, one after the other; what an op moves and what its warps issue
overlap, and the longer of the two counts. Not in it: tensor cores, barriers, conflicts in shared
memory, round trips of masks, what a second pass reads from L2, and launches that overlap. Too much
in it: loops of branches that are not taken, and round trips of warps that hide one another. How
often a sort passes over its keys is not known.

Round trips (of wide loads) and instructions are those of csrc/code_generation.md, read from machine
code for capability 9.0; each loop is gone through as often as `Launch` says. Bytes are the lower
bounds of the benchmarks. Which kernels are launched, with how many blocks, is told here once more,
for bfloat16 and aligned rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch

from benchmarks import goals
from benchmarks.harness import Case

TABLE = Path(__file__).parents[1] / "csrc" / "code_generation.md"


@dataclass(frozen=True)
class Device:
    """Bandwidth, multiprocessors and the 4090's clock are those of the data sheets (the H200's says
    1.98 GHz at most); the rest is assumed, the same for both."""

    name: str
    bandwidth: float  # bytes/s of DRAM
    multiprocessors: int
    clock: float  # Hz
    has_goals: bool = False
    is_hopper: bool = False  # has clusters, and products of a warpgroup
    sorted_keys: int = 16384  # that fit into the shared memory of a block
    dram_cycles: float = 700  # of a round trip
    l2_cycles: float = 300
    launch_gap: float = 1.2e-6  # seconds, from a node of a CUDA graph to the next
    schedulers: int = 4  # of a multiprocessor; each issues an instruction of a warp in a cycle


DEVICES = (
    Device("H200", 4.8e12, 132, 1.8e9, has_goals=True, is_hopper=True, sorted_keys=32768),
    Device("RTX 4090", 1.008e12, 128, 2.52e9),
)


@dataclass(frozen=True)
class Kernel:
    """A row of the table of waits."""

    trips: int
    loops: tuple[int, ...]  # instructions of an iteration


def kernels() -> dict[str, Kernel]:
    head, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().partition("## Waits on ")[2].splitlines()
        if line.startswith("| ")
    ]
    found = {}
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        loops = re.findall(r"(\d+)(?: \([\d.]+\))?(?:, |$)", cells["loops"])
        found[cells["kernel"]] = Kernel(int(cells["of wide loads"]), tuple(map(int, loops)))
    return found


@dataclass(frozen=True)
class Launch:
    """Of a kernel of the table.

    Attributes:
        blocks, warps: how many, and of a block.
        iterations: of its longest loop; the others are gone through once.
    """

    kernel: str
    blocks: int
    warps: int
    iterations: int = 1


# --- which kernels an op launches -------------------------------------------------------------

DIM = 128


def require(x: torch.Tensor, dim: int | None = None) -> None:
    if x.dtype != torch.bfloat16 or dim not in (None, x.shape[-1]):
        raise ValueError(
            f"the model is one of bfloat16 with {DIM} elements a head, got {x.dtype} "
            f"with {x.shape[-1]}"
        )


KEYS = 128  # of a block of key_pass, 32 a warp
QUERIES = 16  # rows that key_pass multiplies at a time
WARPGROUP_QUERIES = 64  # and warpgroup_pass
FEW_ROWS = 16  # of query heads and rows on one KV head, whose logits are kept
CLUSTER, CLUSTER_WARPS, CLUSTER_KEYS = 8, 16, 2048  # blocks for a row; warps and keys of a block
BLOCK_KEYS = 4096  # of which one block makes the scores and selects
BLOCK_LOGITS = 1 << 16  # that a block reads for them


def attention_parts(device, query, key, merged: bool = True) -> list[Launch]:
    """`merged`: a kernel of its own merges the rows' statistics, where there are many."""
    require(query, DIM)
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1:3]
    tiles, packed = ceil(length / KEYS), heads // kv_heads * rows
    blocks, times = tiles * kv_heads * batch, ceil(packed / QUERIES)
    kernel = "attention_scores: key_pass<bf16, 4"
    if device.is_hopper and (packed == WARPGROUP_QUERIES or packed > 80):
        kernel = "attention_scores_warpgroup: warpgroup_pass<bf16, 2"
        times = ceil(packed / WARPGROUP_QUERIES)
    launches = [Launch(f"{kernel}, 0>", blocks, 4, times)]
    if packed > FEW_ROWS or (merged and tiles > 8):
        merging = ceil(heads * rows / 32) * batch
        launches.append(Launch("attention_scores: merge_statistics", merging, 8, ceil(tiles / 64)))
    if packed > FEW_ROWS:
        launches.append(Launch(f"{kernel}, 1>", blocks, 4, times))
    return launches


def attention_scores(device, query, key, *_) -> list[Launch]:
    blocks = ceil(key.shape[2] / 128) * query.shape[0]
    finish = Launch("attention_scores: finish_scores", blocks, 4)
    return [*attention_parts(device, query, key), finish]


def select_topk(device, scores, _) -> list[Launch]:
    batch, length = scores.shape
    fits = batch * CLUSTER <= device.multiprocessors and length <= CLUSTER * CLUSTER_KEYS
    if length > 4096 and device.is_hopper and fits:
        return [Launch("select_topk: select_in_cluster<f32>", batch * CLUSTER, CLUSTER_WARPS)]
    for threads, keys in ((256, 4), (512, 8), (1024, 16)):
        if length <= threads * keys:
            kernel = f"select_topk: select_held<{threads}, {keys}, f32>"
            return [Launch(kernel, batch, threads // 32)]
    return [Launch("select_topk: select_streamed<1024, f32>", batch, 32, ceil(length / 8192))]


def attention_topk(device, query, key) -> list[Launch]:
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1:3]
    few = heads // kv_heads * rows <= FEW_ROWS
    summed = heads * rows if few else kv_heads  # of which a score is made

    def fit(blocks: int, keys: int) -> bool:
        return length <= blocks * keys and summed * length <= blocks * BLOCK_LOGITS

    clusters = device.is_hopper and batch * CLUSTER <= device.multiprocessors
    if summed <= 512 and clusters and fit(CLUSTER, CLUSTER_KEYS):
        kernel = "attention_topk: finish_and_select_in_cluster"
        finish = Launch(kernel, batch * CLUSTER, CLUSTER_WARPS)
        return [*attention_parts(device, query, key, merged=False), finish]
    if summed <= 512 and fit(1, BLOCK_KEYS):
        finish = Launch("attention_topk: finish_and_select", batch, 32)
        return [*attention_parts(device, query, key), finish]
    scores = torch.empty(batch, length, device="meta")
    return [*attention_scores(device, query, key), *select_topk(device, scores, None)]


def select_diverse(device, features, k, *relevance) -> list[Launch]:
    """Of rows of more than 32 bytes, up to 16384 of them; dpp where there is relevance."""
    require(features)
    batch, length, width = features.shape
    large = batch * triangle(ceil(length / 128))
    tile, blocks = (128, large) if large >= 28 else (64, batch * triangle(ceil(length / 64)))
    matrix = [
        Launch(f"select_diverse: products<bf16, {tile}>", blocks, tile // 16, ceil(width / 64)),
        Launch("select_diverse: cosines<bf16>", batch * ceil(length / 8), 8, ceil(length / 256)),
    ]
    if not relevance:
        columns = 4 if length <= 1024 else 16
        kernel = f"select_diverse: maxmin_held<{columns}>"
        return [*matrix, Launch(kernel, batch, ceil(length / columns / 32), k)]
    blocks, warps = (CLUSTER, 8) if device.is_hopper else (1, 16)
    columns = ceil(length / blocks / 32 / warps)  # of a thread
    in_shared = (length / blocks + 1) * k * 4 < device.sorted_keys * 4
    kernel = f"select_diverse: greedy<f32, 1, false, {str(in_shared).lower()}>"
    return [*matrix, Launch(kernel, batch * blocks, warps, k * columns * ceil(k / 32))]


def triangle(tiles: int) -> int:
    return tiles * (tiles + 1) // 2


def token_contribution(device, query, key, *_) -> list[Launch]:
    require(query, DIM)
    batch, heads, _ = query.shape
    kv_heads, length = key.shape[1:3]
    parts = batch * kv_heads * ceil(heads / kv_heads / 8) * ceil(length / 128)
    warps = 8  # of 16 groups of 16 lanes
    tokens = 8 * warps // min(kv_heads, warps)  # of a block of compare
    return [
        Launch("token_contribution: attend<bf16, true>", parts, warps),
        Launch("token_contribution: combine", batch * heads, 8),
        Launch(
            "token_contribution: compare<bf16, true>",
            *(batch * ceil(length / tokens), warps, ceil(kv_heads / warps)),
        ),
    ]


def inflection(device, curve) -> list[Launch]:
    batch, length = curve.shape
    for threads, most in ((256, 2048), (1024, 8192)):
        if length <= most:
            kernel = f"inflection: inflection_held<{threads}, f32>"
            return [Launch(kernel, batch, threads // 32)]
    in_shared = str(device.sorted_keys >= length).lower()
    kernel = f"inflection: inflection_streamed<1024, {in_shared}, f32>"
    return [Launch(kernel, batch, 32, ceil(length / 8192))]


def cls_inflection(device, features, _) -> list[Launch]:
    require(features)
    batch, length, _ = features.shape
    tokens = 1 if batch * length < 16384 else 4
    kernel = f"cls_inflection: similarities<bf16, true, {tokens}>"
    curve = torch.empty(batch, length, device="meta")
    return [Launch(kernel, ceil(length / tokens / 8) * batch, 8), *inflection(device, curve)]


COPIED = 128 * 4 * 16  # bytes of a block: threads, rows of a thread, bytes at a time


def compact_rows(device, tensors, indices) -> list[Launch]:
    written = sum(x.element_size() * x[0, 0].numel() for x in tensors) * indices.numel()
    return [Launch("compact_rows: compact_rows_kernel<16>", ceil(written / COPIED), 4)]


def compact_kv(device, keys, values, indices) -> list[Launch]:
    rows = sum(x.element_size() * x.shape[1] * x.shape[3] for x in (*keys, *values))
    tensors = len(keys) + len(values)
    capacity = next(most for most in (16, 80, 300) if tensors <= most)
    blocks = ceil(rows * indices.numel() / COPIED)
    return [Launch(f"compact_rows: compact_rows_kernel<{capacity}>", blocks, 4)]


def passive_attention(device, query, *_) -> list[Launch]:
    require(query, DIM)
    batch, heads, length, _ = query.shape
    tiles = length // 64 + 3  # of 64 rows, which look back over half of the keys on average
    return [
        Launch("passive_attention: list_tokens_kernel", batch, 8),
        Launch(
            "passive_attention: attend_kernel<bf16, 128>",
            *(batch * heads * tiles, 4, ceil(length / 128)),
        ),
    ]


def assign_rows(device, keys, targets) -> list[Launch]:
    require(keys)
    batch, length, width = keys.shape
    count = targets.shape[1]
    side = 4 if count > 64 and batch * ceil(length / 128) >= 100 else 2  # warps; of 32 rows each
    chunks = ceil(count / 32 / side) * ceil(width / 32)
    return [
        Launch(
            "assign_rows: key_norms<bf16>",
            *(ceil((length + count) / 8) * batch, 8, ceil(width / 1024)),
        ),
        Launch(
            f"assign_rows: nearest_targets<bf16, {side}>",
            *(ceil(length / 32 / side) * batch, side * side, chunks),
        ),
    ]


def merge_rows(device, features, _, targets) -> list[Launch]:
    require(features)
    batch, length, width = features.shape
    count = targets.shape[1]
    blocks = batch * count * ceil(width / 512)
    return [
        Launch("merge_rows: list_members", batch, 8, ceil(length / 256)),
        Launch("merge_rows: merge_members<bf16, true>", blocks, 2, ceil(length / count / 8)),
    ]


LAUNCHES: dict[str, Callable[..., list[Launch]]] = {
    function.__name__: function
    for function in (
        assign_rows,
        attention_scores,
        attention_topk,
        cls_inflection,
        compact_kv,
        compact_rows,
        inflection,
        merge_rows,
        passive_attention,
        select_diverse,
        select_topk,
        token_contribution,
    )
}

# --- the model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call, and what they are made of."""

    gaps: float
    trips: float
    bytes: float
    issue: float

    @property
    def total(self) -> float:
        return self.gaps + self.trips + max(self.bytes, self.issue)


def estimate(
    launches: list[Launch], moved: int, device: Device, table: dict[str, Kernel]
) -> Estimate:
    """The first launch reads from DRAM what the op is given, the others from L2 what it made."""
    trips = issued = 0.0
    for i, launch in enumerate(launches):
        if launch.kernel not in table:
            raise ValueError(f"{launch.kernel} is not in {TABLE.name}: has it another name now?")
        kernel = table[launch.kernel]
        trips += kernel.trips * (device.l2_cycles if i else device.dram_cycles)
        warp = sum(kernel.loops) + (launch.iterations - 1) * max(kernel.loops, default=0)
        most = ceil(launch.blocks / device.multiprocessors)  # blocks of one multiprocessor
        issued += warp * ceil(most * launch.warps / device.schedulers)
    return Estimate(
        len(launches) * device.launch_gap,
        trips / device.clock,
        moved / device.bandwidth,
        issued / device.clock,
    )


def lines(cases: list[Case], device: Device, table: dict[str, Kernel]) -> list[str]:
    head = [
        "op",
        "shape",
        "launches",
        "gaps",
        "round trips",
        "bytes",
        "issue",
        "model",
        "of a copy",
    ]
    rows = [head, ["---", "---", *["---:"] * 7]]
    for case in cases:
        launches = LAUNCHES[case.op](device, *case.make())
        made_of = estimate(launches, case.bytes_moved, device, table)
        parts = (made_of.gaps, made_of.trips, made_of.bytes, made_of.issue, made_of.total)
        numbers = [f"{1e6 * part:.1f}" for part in parts]
        share = f"{100 * made_of.bytes / made_of.total:.0f} %"
        rows.append([case.op, case.shape, str(len(launches)), *numbers, share])
    if device.has_goals:
        goal_of = [str(case.goal) if case.goal else "" for case in cases]
        for row, goal in zip(rows, ("goal", "---", *goal_of), strict=True):
            row.append(goal)
    table_of = [f"| {' | '.join(row)} |" for row in rows]
    return [f"## {device.name}: a model, not a measurement; microseconds", "", *table_of]


def main() -> None:
    print(__doc__.split("\n\n")[1], end="\n\n")
    table, cases = kernels(), goals.cases("meta")
    for device in DEVICES:
        print(*lines(cases, device, table), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
