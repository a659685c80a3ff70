"""Exact match of the pocket LLaVA on held-out questions, dense or pruned.

    python benchmarks/pocket_llava/evaluate.py --method none --questions 2000
    python benchmarks/pocket_llava/evaluate.py --method fastv:2:0.5 random:0.22 --json results.json

The questions are those of the "test" split, one per picture, the five kinds in turn. Every method
answers the same questions; `--json` writes the table with the machine and the versions.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

if __package__ is None or __package__ == "":  # run as a file: make the source tree importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtp_kernels.chat import chat_inputs, greedy_answers
from vtp_kernels.demo import load, pruned
from vtp_kernels.machine import describe
from vtp_kernels.methods import method_from_spec
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED

LONGEST_ANSWER = 4  # tokens: two words, </s>, and one more to notice an answer that does not end


def evaluate(model, processor, method, count: int, batch_size: int, split: str, label: str) -> dict:
    """Exact match per kind of question; tokens and FLOPs that the method left, batch means."""
    right, asked = dict.fromkeys(scenes.KINDS, 0), dict.fromkeys(scenes.KINDS, 0)
    visual_shares, reductions = [], []
    stream = scenes.cases(split, count)
    progress = tqdm(total=count, desc=label, unit=" questions", disable=None)
    with pruned(model, method) as run, progress:
        while batch := list(itertools.islice(stream, batch_size)):
            images = [Image.fromarray(case.scene.image) for case in batch]
            texts = [case.question.text for case in batch]
            inputs = chat_inputs(processor, images, texts).to(model.device)
            answers = greedy_answers(model, processor, inputs, LONGEST_ANSWER)
            for case, answer in zip(batch, answers, strict=True):
                asked[case.question.kind] += 1
                right[case.question.kind] += answer == case.question.answer
            progress.update(len(batch))
            if run is not None:
                report = run.report()
                visual = [tokens for layer in report.visual_tokens_per_layer for tokens in layer]
                visual_shares.append(statistics.fmean(visual) / scenes.GRID**2)
                reductions.append(report.flops_reduction)
    return {
        "method": label,
        "split": split,
        "questions": count,
        "exact_match": sum(right.values()) / sum(asked.values()),
        "exact_match_by_kind": {kind: right[kind] / asked[kind] for kind in right if asked[kind]},
        "visual_tokens_share": statistics.fmean(visual_shares or [1.0]),
        "prefill_flops_reduction": statistics.fmean(reductions or [0.0]),
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, per cent."""
    head = [
        "method",
        "exact match",
        *scenes.KINDS,
        "visual tokens, layer mean",
        "prefill FLOPs saved",
    ]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        kinds = [
            f"{100 * row['exact_match_by_kind'].get(kind, float('nan')):.1f}"
            for kind in scenes.KINDS
        ]
        shares = [
            f"{100 * row[name]:.1f}" for name in ("visual_tokens_share", "prefill_flops_reduction")
        ]
        lines.append(
            " | ".join([row["method"], f"{100 * row['exact_match']:.1f}", *kinds, *shares])
        )
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", nargs="+", default=["none"], help="none, random:0.22, fastv:2:0.5, a JSON file"
    )
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--split", default="test", choices=("test", "calibration"))
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--model", type=Path, default=TRAINED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, help="write the rows, the machine and the versions here"
    )
    args = parser.parse_args()
    if args.questions < 1 or args.batch < 1:
        parser.error("--questions and --batch: expected at least 1")
    methods = {spec: method_from_spec(spec) for spec in args.method}

    model, processor = load(args.model, device=args.device, dtype="float32")
    rows = [
        evaluate(model, processor, method, args.questions, args.batch, args.split, spec)
        for spec, method in methods.items()
    ]
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"rows": rows, **describe()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
