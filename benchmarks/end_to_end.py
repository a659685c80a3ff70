"""A whole model, dense and pruned: time to first token, decoding, memory.

    python -m benchmarks.end_to_end --model pocket
    python -m benchmarks.end_to_end --model llava-1.5-7b --random-weights --batch 1 8 32
    python -m benchmarks.end_to_end --model llava-next-7b --random-weights --tiny   # a rehearsal

`pocket` is the small trained LLaVA of this repository. The others are built from their
configuration, with random weights: time depends on shapes, so methods whose counts depend on the
picture follow the schedule their paper's savings come from. Nothing is downloaded.

Dense (SDPA) and pruned prefills take turns, vision tower included; speed-ups are medians over the
turns. Beside each stands the ideal: by how much fewer FLOPs there are, tower included, with all
rows that are left in the last layer (which runs on the one whose logits are asked for). "Pruning"
is the time between layers, in which rows are scored, chosen and moved. One method stands there
as published code does it, too: see published.py.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import vtp_kernels as vtp
from benchmarks import harness
from benchmarks.identity import found_before, identity
from benchmarks.memory import peak_bytes
from benchmarks.published import published_fastv
from vtp_kernels.accounting import MODELS
from vtp_kernels.demo import load, pocket_methods, pruned
from vtp_kernels.machine import describe
from vtp_kernels.methods import FastV, Method, PyramidDrop, RandomPruning, Schedule, VisiPruner
from vtp_kernels.models.passage.prefill import Prefill

DENSE, PUBLISHED = "dense", "FastV, as published"

#: For 32 layers, as their papers have them. VisiPruner's is the course that saves its 53.9 %.
PAPERS: dict[str, Method] = {
    "FastV": FastV(2, 0.5),
    "PyramidDrop": PyramidDrop(),
    "VisiPruner": VisiPruner(
        shallow_attention="skip",
        decision="fixed",
        schedule=Schedule({15: 0}, score="contribution"),
    ),
    "random": RandomPruning(0, 0.5),
}


@dataclass
class Row:
    """One method at one batch size. Times are medians; `spread`, lowest and highest, of ratios.

    `share_of_ideal` is speed-up over ideal speed-up. Bytes: keys and values after the prompt; the
    most memory that prompt and decoding took, the model itself apart (`memory.peak_bytes`).
    """

    model: str
    method: str
    batch: int
    first_token_ms: float
    speedup: float
    spread: tuple[float, float]
    ideal_speedup: float
    share_of_ideal: float
    pruning_ms: float
    decode_tokens_per_second: float | None
    kv_bytes: int | None
    peak_bytes: int | None


@dataclass
class Turns:
    """What every turn of one method took, in seconds."""

    first_token: list[float] = field(default_factory=list)
    pruning: list[float] = field(default_factory=list)
    decode_step: list[float] = field(default_factory=list)


# ---- models and prompts --------------------------------------------------------------------------


TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def random_model(name: str, device: str, dtype: torch.dtype, tiny: bool = False):
    """A model of that name's configuration, with random weights; `tiny`: as many layers, narrow."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    kinds = {
        "llava-1.5-7b": (LlavaForConditionalGeneration, LlavaConfig, {}),
        "llava-1.5-13b": (LlavaForConditionalGeneration, LlavaConfig, MODELS["llava-1.5-13b"]),
        "llava-next-7b": (LlavaNextForConditionalGeneration, LlavaNextConfig, {}),
    }
    model_class, config_class, settings = kinds[name]
    text = {"model_type": "llama", "vocab_size": 32064} | settings
    rest = {"vision_config": TINY_TOWER, "image_token_id": 127} if tiny else {}
    config = config_class(text_config=text | TINY if tiny else text, **rest)
    if tiny and config.model_type == "llava_next":
        side = TINY_TOWER["image_size"]
        config.image_grid_pinpoints = [[2 * side, 2 * side]]
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def random_prompts(model, batch: int, before: int = 35, after: int = 29) -> dict:
    """One picture a prompt, between so many tokens of text."""
    config, device = model.config, model.device
    side = config.vision_config.image_size
    draw = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, side, side, generator=draw)
    inputs = {"pixel_values": pixels}
    if config.model_type == "llava_next":  # a square picture of four tiles, and the whole of it
        inputs["pixel_values"] = torch.randn(batch, 5, 3, side, side, generator=draw)
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * batch)
    image = config.image_token_id
    ids = torch.randint(3, image, (batch, before + after), generator=draw)
    images = torch.full((batch, visual_tokens(config)), image)
    inputs["input_ids"] = torch.cat((ids[:, :before], images, ids[:, before:]), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: x.to(device) for name, x in inputs.items()}


def visual_tokens(config) -> int:
    """Of the picture that random_prompts draws."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type != "llava_next":
        return side**2
    return side**2 + 2 * side * (2 * side + 1)  # four tiles, with a newline behind each row


def pocket_prompts(model, processor, batch: int) -> dict:
    """Questions of the calibration split."""
    from PIL import Image

    from vtp_kernels.chat import chat_inputs
    from vtp_kernels.pocket_llava import scenes

    cases = list(scenes.cases("calibration", batch))
    pictures = [Image.fromarray(case.scene.image) for case in cases]
    return chat_inputs(processor, pictures, [x.question.text for x in cases]).to(model.device)


# ---- one turn ------------------------------------------------------------------------------------


class Clock:
    """Seconds of the device, or of the host where there is no other."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        """Waits for `end`."""
        if not self.cuda:
            return end - start
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


@contextlib.contextmanager
def watched(clock: Clock, spans: list):
    """Notes the begin and end of what the engine does between layers."""
    pruning = Prefill.let_rows_leave

    def timed(self, *args):
        start = clock.now()
        result = pruning(self, *args)
        spans.append((start, clock.now()))
        return result

    Prefill.let_rows_leave = timed
    try:
        yield
    finally:
        Prefill.let_rows_leave = pruning


@torch.inference_mode()
def turn(model, inputs: dict, apply: Callable, steps: int, turns: Turns | None) -> None:
    """One prefill and `steps` steps of decoding, noted in `turns`."""
    clock, spans = Clock(model.device), []
    if clock.cuda:
        torch.cuda.synchronize()
    with apply(), watched(clock, spans):
        start = clock.now()
        output = model(**inputs, logits_to_keep=1, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        seconds = clock.between(start, clock.now())
        mask, start = inputs["attention_mask"], clock.now()
        for _ in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = model(
                input_ids=token,
                attention_mask=mask,
                past_key_values=output.past_key_values,
                logits_to_keep=1,
            )
            token = output.logits[:, -1:].argmax(-1)
        decoding = clock.between(start, clock.now())
    if turns is None:
        return
    turns.first_token.append(seconds)
    turns.pruning.append(sum(clock.between(*span) for span in spans))
    if steps:
        turns.decode_step.append(decoding / steps)


# ---- all of them ---------------------------------------------------------------------------------


def measure(
    name: str, model, inputs: dict, methods: dict[str, Method], repeats: int, steps: int
) -> list[Row]:
    """Dense, `methods`, and for one prompt published code, in turns."""
    batch = len(inputs["input_ids"])
    runs: dict[str, Callable] = {DENSE: contextlib.nullcontext}
    runs |= {label: lambda x=method: pruned(model, x) for label, method in methods.items()}
    if batch == 1:  # the rows it leaves do not fit the masks that decoding makes
        fastv = methods["FastV"]
        runs[PUBLISHED] = lambda: published_fastv(model, fastv.layer, fastv.keep)
    turns = {label: Turns() for label in runs}
    decoded = {label: 0 if label == PUBLISHED else steps for label in runs}
    for number in tqdm(range(repeats + 1), desc=f"{name}, batch {batch}", disable=None):
        for label, apply in runs.items():
            noted = turns[label] if number else None  # the first turn warms up
            turn(model, inputs, apply, decoded[label], noted)
    # apart, since memory that has just been given back is slow to get
    peaks = {
        label: peak_bytes(model.device, partial(turn, model, inputs, apply, decoded[label], None))
        for label, apply in runs.items()
    }
    reports = {label: report(model, inputs, method) for label, method in methods.items()}
    reports[DENSE] = report(model, inputs, Schedule({}))
    reports[PUBLISHED] = reports["FastV"]
    tower = tower_flops(model, inputs)
    return [
        row(name, label, batch, turns[label], turns[DENSE], reports[label], tower, peaks[label])
        for label in runs
    ]


@torch.inference_mode()
def report(model, inputs: dict, method: Method):
    with vtp.prune(model, method) as run:
        model(**inputs, logits_to_keep=1)
    return run.report()


def tower_flops(model, inputs: dict) -> int:
    """Of the vision tower and the projector, for all pictures."""
    config, pixels = model.config, inputs["pixel_values"]
    pictures = pixels.shape[:-3].numel()
    return vtp.flops(config, 0, images=pictures)


def row(name, label, batch, turns: Turns, dense: Turns, found, tower: int, peak: int | None) -> Row:
    ratios = [d / p for d, p in zip(dense.first_token, turns.first_token, strict=True)]
    ideal = (found.dense_prefill_flops + tower) / (found.prefill_flops + tower)
    speedup = statistics.median(ratios)
    published = label == PUBLISHED
    return Row(
        model=name,
        method=label,
        batch=batch,
        first_token_ms=1e3 * statistics.median(turns.first_token),
        speedup=speedup,
        spread=(min(ratios), max(ratios)),
        ideal_speedup=ideal,
        share_of_ideal=speedup / ideal,
        pruning_ms=1e3 * statistics.median(turns.pruning),
        decode_tokens_per_second=batch / statistics.median(turns.decode_step)
        if turns.decode_step
        else None,
        kv_bytes=None if published else found.kv_bytes,
        peak_bytes=peak,
    )


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| model | batch | method | first token | times faster | ideal | pruning | decoding "
        "| KV cache | peak memory |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for x in rows:
        rate, kv, peak = x.decode_tokens_per_second, x.kv_bytes, x.peak_bytes
        cells = [
            x.model,
            str(x.batch),
            x.method,
            f"{x.first_token_ms:,.1f} ms",
            f"{x.speedup:.2f}",
            f"{x.ideal_speedup:.2f}",
            f"{x.pruning_ms:.1f} ms" if x.pruning_ms else "",
            "" if rate is None else f"{rate:,.0f} tokens/s",
            "" if kv is None else f"{kv / 2**20:,.1f} MiB",
            "" if peak is None else f"{peak / 2**20:,.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("pocket", "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b")
    parser.add_argument("--model", default="pocket", choices=names)
    parser.add_argument(
        "--random-weights", action="store_true", help="needed for all models but pocket"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="random weights of narrow layers: a rehearsal"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, help="write the rows, machine and versions here, after every batch"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure the batches that --json lacks"
    )
    args = parser.parse_args()
    if args.random_weights == (args.model == "pocket"):
        parser.error("--random-weights: pocket is trained, all other models are built from scratch")
    if min(*args.batch, args.repeats, args.decode_steps) < 1:
        parser.error("--batch, --repeats and --decode-steps: expected at least 1")
    if args.tiny and args.model == "pocket":
        parser.error("--tiny: pocket is as small as it is")
    if args.resume and args.json is None:
        parser.error("--resume: needs --json, the file to go on with")
    whose = {"identity": identity(), "device": args.device, "machine": describe()["machine"]}
    before = found_before(args.json, whose) if args.resume else None
    rows = [Row(**x) for x in before["rows"]] if before else []
    batches = [x for x in args.batch if x not in {row.batch for row in rows}]
    if not batches:
        print(table(rows))
        return
    if args.model == "pocket":
        from vtp_kernels.pocket_llava.model import TRAINED

        model, processor = load(TRAINED, device=args.device)
        methods = pocket_methods()
    else:
        cuda = torch.device(args.device).type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        model = random_model(args.model, args.device, dtype, args.tiny)
        methods = PAPERS
    label = f"{args.model} (tiny)" if args.tiny else args.model
    for batch in batches:
        if args.model == "pocket":
            inputs = pocket_prompts(model, processor, batch)
        else:
            inputs = random_prompts(model, batch)
        rows += measure(label, model, inputs, methods, args.repeats, args.decode_steps)
        if args.json:
            harness.write(args.json, {"rows": [asdict(x) for x in rows], **whose})
    print(table(rows))


if __name__ == "__main__":
    main()
