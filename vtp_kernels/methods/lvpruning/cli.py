"""`python -m vtp_kernels lvpruning train | flops`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from .recipe import PRECISIONS, Recipe

__all__ = ["add_to"]

POCKET = "pocket"


def _numbers(kind: type) -> Any:
    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(map(kind, text.split(",")))

    numbers.__name__ = f"{kind.__name__}s with commas between them"  # argparse names it in errors
    return numbers


# Settings of a Recipe on the command line: how they are read, and what they are.
OPTIONS: dict[str, tuple[Any, str]] = {
    "layers": (_numbers(int), "decoder layers before which tokens leave, as in 1,8,16"),
    "ratios": (_numbers(float), "shares of the visual tokens left there, as in 0.5,0.3,0.1"),
    "width": (int, "of the deciders, a multiple of 8 (default: that of the model)"),
    "epochs": (int, "times the data is gone through"),
    "batch": (int, "conversations per step, of all processes together"),
    "micro_batch": (int, "conversations that a process runs at once"),
    "learning_rate": (float, "peak of AdamW's rate"),
    "warmup": (float, "share of the steps it takes to get there"),
    "weight_decay": (float, "AdamW's"),
    "clip": (float, "largest norm of the gradient"),
    "ratio_weight": (float, "weight of the ratio loss"),
    "temperature": (float, "of the Gumbel softmax"),
    "final_noise": (float, "factor of the Gumbel noise in the end"),
    "gradient": (str, "of dropped tokens: secant (what one would change) or tangent"),
    "precision": (str, f"one of {', '.join(PRECISIONS)}"),
    "seed": (int, "first weights, order of the data, noise"),
    "save_every": (int, "steps between checkpoints"),
}


def add_to(commands: Any) -> None:
    """Add the command to those of an argument parser."""
    command = commands.add_parser("lvpruning", help="train deciders, or count as the paper does")
    actions = command.add_subparsers(required=True, dest="action", metavar="action")

    train = actions.add_parser(
        "train", help="train deciders for a model; under torchrun, in several processes"
    )
    train.add_argument("--model", required=True, help="a folder or a hub name")
    train.add_argument(
        "--data",
        required=True,
        help='JSON of conversations as LLaVA is trained on, or "pocket:COUNT": so many questions '
        "of the small LLaVA's world",
    )
    train.add_argument("--images", type=Path, help="where image paths start (default: at the JSON)")
    train.add_argument(
        "--out", type=Path, required=True, help="folder for the deciders; a run there goes on"
    )
    train.add_argument("--device", help="default: cuda if there is one")
    train.add_argument("--dtype", default="auto", help="of the model: float32, bfloat16, ...")
    for field in fields(Recipe):
        kind, what = OPTIONS[field.name]
        default = "" if field.default is None else f" (default: {_written(field.default)})"
        flag = f"--{field.name.replace('_', '-')}"
        train.add_argument(flag, type=kind, default=field.default, help=what + default)
    train.set_defaults(command=_train)

    flops = actions.add_parser("flops", help="LLaVA-1.5-7B, by the paper's recipe")
    flops.add_argument(
        "--ratios", type=_numbers(float), nargs="+", help="default: those of the paper"
    )
    flops.set_defaults(command=_flops)


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _train(args: argparse.Namespace) -> None:
    import os

    import torch

    from vtp_kernels.demo import load

    from .training import train

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    dataset = _dataset(args.data, args.images)  # before the model is loaded
    device = args.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # as torchrun numbers its processes
    if device is not None and device.startswith("cuda"):
        torch.cuda.set_device(device)
    model, processor = load(args.model, device=device, dtype=args.dtype)
    folder = train(model, dataset, processor=processor, out=args.out, recipe=recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"deciders: {folder}; prune with --method lvpruning:{folder}")


def _dataset(data: str, images: Path | None) -> Any:
    from .data import LlavaConversations

    name, _, count = data.partition(":")
    if name != POCKET:
        return LlavaConversations(data, images)
    from vtp_kernels.pocket_llava.questions import PocketQuestions

    if not count.isdecimal():
        raise ValueError(f"--data: expected pocket:COUNT as in pocket:5000, got {data!r}")
    return PocketQuestions("train", int(count))


def _flops(args: argparse.Namespace) -> None:
    from transformers import LlavaConfig

    from .published import PAPER_RATIOS, published_table

    # The defaults of LlavaConfig are LLaVA-1.5-7B: CLIP-L/14 at 336 pixels, Llama of 32 x 4096.
    print(published_table(LlavaConfig(), tuple(args.ratios or PAPER_RATIOS)))
