"""What the engine itself costs: a model with a method that keeps all, beside the model alone.

    python -m benchmarks.engine_overhead --json out/engine_overhead.json

Hooks run, rows are scored, chosen and copied, and masks are made, but every row stays: what is
slower than the model alone is overhead. "keep all" has three stages that gather all rows, "score,
keep all" ranks by attention before each too (all but one token stays at each). A LLaVA of the
proportions of LLaVA-1.5 with random weights, one picture and 64 tokens of text; a vision tower as
small as can be, so that it hides nothing.

`python` are microseconds that a prefill of FastV spends in the engine on the host, of a model so
narrow that its ops take little: before a layer with nothing to do, before the one where rows leave,
in all, and how much of that is in this package's ops.

Both take turns, prefill and decoding apart; ratios are medians over the turns, with the middle half
of them in brackets. The model alone stands beside itself as well: that is the noise. On a CPU the
clock is the process's own, which other programs disturb less.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import vtp_kernels as vtp
from benchmarks import harness
from benchmarks.end_to_end import Clock as DeviceClock
from vtp_kernels.models.passage.engine import Engine

PATCHES, TEXT = 24, 64  # 576 visual tokens
#: (width, layers) of the language model; LLaVA-1.5-7B is (4096, 32).
SIZES = {"small": (512, 8), "medium": (1024, 8), "large": (2048, 8), "7b": (4096, 32)}


@dataclass
class Row:
    """Ratios: time with the method over time of the model alone, less 1."""

    size: str
    method: str
    prefill_ms: float
    prefill_overhead: float
    prefill_quartiles: tuple[float, float]
    step_ms: float
    step_overhead: float
    step_quartiles: tuple[float, float]


class Clock(DeviceClock):
    def now(self):
        return super().now() if self.cuda else time.process_time()


def model_of(width: int, depth: int, device: str, dtype: torch.dtype):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=14 * PATCHES,
            patch_size=14,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=11008 * width // 4096,
            num_hidden_layers=depth,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
        ),
        image_token_id=1023,
        image_token_index=1023,
        image_seq_length=PATCHES**2,
    )
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def prompt(device: str, dtype: torch.dtype) -> dict:
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (1, TEXT), generator=draw)
    ids = torch.cat((text[:, :32], torch.full((1, PATCHES**2), 1023), text[:, 32:]), 1)
    pixels = torch.randn(1, 3, 14 * PATCHES, 14 * PATCHES, generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def methods(depth: int) -> dict[str, vtp.Schedule]:
    stages = (depth // 4, depth // 2, 3 * depth // 4)
    tokens = PATCHES**2
    return {
        "keep all": vtp.Schedule(dict.fromkeys(stages, 1.0)),
        "score, keep all": vtp.Schedule({k: tokens - 1 - i for i, k in enumerate(stages)}),
    }


@torch.inference_mode()
def turn(model, inputs: dict, attached: Callable, steps: int) -> tuple[float, float]:
    """Seconds of a prefill, and of a step of decoding after it."""
    clock, token = Clock(model.device), inputs["input_ids"][:, -1:]
    with attached():
        start = clock.now()
        # All logits: of fewer the last layer would run on fewer rows, and save what this measures.
        cache = model(**inputs, use_cache=True).past_key_values
        prefill = clock.between(start, clock.now())
        start = clock.now()
        for _ in range(steps):
            model(input_ids=token, past_key_values=cache)
        return prefill, clock.between(start, clock.now()) / steps


def measure(size: str, model, inputs: dict, turns: int, steps: int) -> list[Row]:
    runs: dict[str, Callable] = {"alone": contextlib.nullcontext}
    runs["alone, again"] = contextlib.nullcontext
    for name, method in methods(len(model.model.language_model.layers)).items():
        runs[name] = lambda x=method: vtp.prune(model, x)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in tqdm(range(turns + 1), desc=size, disable=None):
        order = list(runs.items())
        for name, attached in order if number % 2 else reversed(order):
            taken = turn(model, inputs, attached, steps)
            if number:  # the first turn warms up
                seconds[name].append(taken)
    return [row(size, name, seconds[name], seconds["alone"]) for name in runs if name != "alone"]


def row(size: str, name: str, ours: list, alone: list) -> Row:
    parts = []
    for i in range(2):
        ratios = [a[i] / b[i] - 1 for a, b in zip(ours, alone, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        parts += [1e3 * statistics.median(a[i] for a in ours), middle, (low, high)]
    return Row(size, name, *parts)


@torch.inference_mode()
def python_costs(turns: int) -> dict[str, float]:
    """Microseconds in the engine's hooks before layers of a prefill, least of the turns."""
    model = model_of(128, 8, "cpu", torch.float32)
    inputs, decides = prompt("cpu", torch.float32), 2
    spent: dict[int, list[float]] = {}
    before_layer = Engine._before_layer

    def timed(self, index, *args):
        start = time.perf_counter()
        result = before_layer(self, index, *args)
        spent.setdefault(index, []).append(1e6 * (time.perf_counter() - start))
        return result

    Engine._before_layer = timed
    try:
        with vtp.prune(model, vtp.FastV(decides, 4)):
            for _ in range(turns):
                model(**inputs, use_cache=True)
            Engine._before_layer = before_layer
            ops = [_in_ops(model, inputs) for _ in range(turns)]
    finally:
        Engine._before_layer = before_layer
    least = {index: min(taken) for index, taken in spent.items()}
    quiet = [least[index] for index in range(decides + 2, len(least))]
    return {
        "quiet_layer": statistics.median(quiet),
        "decision": least[decides],
        "ops": min(ops),
        "prefill": sum(least.values()),
    }


def _in_ops(model, inputs: dict) -> float:
    """Microseconds in the ops of this package, all of one prefill."""
    with torch.autograd.profiler.profile() as profile:
        model(**inputs, use_cache=True)
    ours = [x for x in profile.key_averages() if x.key.startswith("vtp_kernels::")]
    return float(sum(x.cpu_time_total for x in ours))


def table(rows: list[Row]) -> str:
    lines = [
        "| size | method | prefill | overhead | step | overhead |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for x in rows:
        prefill, step = (
            f"{100 * middle:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
            for middle, (low, high) in (
                (x.prefill_overhead, x.prefill_quartiles),
                (x.step_overhead, x.step_quartiles),
            )
        )
        lines.append(
            f"| {x.size} | {x.method} | {x.prefill_ms:,.1f} ms | {prefill} | {x.step_ms:,.2f} ms "
            f"| {step} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    default = ["7b"] if cuda else ["medium"]
    parser.add_argument("--size", nargs="+", choices=SIZES, default=default)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=16, help="of decoding, in each turn")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="write the rows, machine and versions here")
    args = parser.parse_args()
    if args.turns < 3 or args.steps < 1:
        parser.error("--turns: expected at least 3; --steps: expected at least 1")
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    inputs, rows = prompt(args.device, dtype), []
    for size in args.size:
        model = model_of(*SIZES[size], args.device, dtype)
        rows += measure(size, model, inputs, args.turns, args.steps)
    costs = python_costs(2 * args.turns)
    print(table(rows))
    print(", ".join(f"{name}: {taken:.1f} us" for name, taken in costs.items()))
    if args.json:
        harness.write(args.json, {"rows": [asdict(x) for x in rows], "python": costs})


if __name__ == "__main__":
    main()
