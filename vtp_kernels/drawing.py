"""`vtp-kernels plot`: pictures of what files hold. Only what draws imports what drawing needs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_to"]

RULES = ("chord", "kneedle", "iqr", "mass")


def add_to(commands: Any) -> None:
    """Add the command to those of an argument parser."""
    command = commands.add_parser("plot", help="draw what a file holds")
    kinds = command.add_subparsers(required=True, dest="kind", metavar="kind")

    tokens = kinds.add_parser("tokens", help="what of a picture was kept, layer by layer")
    tokens.add_argument(
        "files", type=Path, nargs="+", help="what report.save() wrote; several: side by side"
    )
    tokens.add_argument(
        "--image",
        type=Path,
        action="append",
        required=True,
        help="the picture; several in their order",
    )
    tokens.add_argument(
        "--grid", type=_grid, help="rows and columns of its tokens, as in 12x16 (default: square)"
    )
    tokens.set_defaults(draw=_tokens)

    curve = kinds.add_parser("curve", help="sorted scores and their knee")
    curve.add_argument("files", type=Path, nargs=1, help="JSON: the scores of a picture, a list")
    curve.add_argument("--rule", default="chord", choices=RULES, help="default: chord")
    curve.set_defaults(draw=_curve)

    layers = kinds.add_parser("layers", help="tokens left by layer, dense and pruned")
    layers.add_argument(
        "files", type=Path, nargs="+", help="what report.save(), or run --json or demo --json wrote"
    )
    layers.set_defaults(draw=_layers)

    tradeoff = kinds.add_parser("tradeoff", help="right answers against FLOPs saved")
    tradeoff.add_argument("files", type=Path, nargs="+", help="result files of `make evaluate`")
    tradeoff.set_defaults(draw=_tradeoff)

    for kind, parser in kinds.choices.items():
        parser.add_argument("--out", type=Path, default=Path(f"vtp_{kind}.png"), help="the picture")
        parser.set_defaults(command=_draw)
    for parser in (tokens, layers):
        parser.add_argument("--sample", type=int, default=0, help="which prompt, from 0")


def _draw(args: argparse.Namespace) -> None:
    from vtp_kernels import plot
    from vtp_kernels.pictures import check_writable

    plot.check_matplotlib()
    check_writable(args.out, "--out")
    args.draw(args)
    print(args.out)


def _grid(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS as in 12x16, got {text!r}")
    rows, columns = map(int, text.split("x"))
    return rows, columns


def _tokens(args: argparse.Namespace) -> None:
    from vtp_kernels.models import Report
    from vtp_kernels.plot.tokens import one_or_several

    reports = _named([Report.load(path) for path in args.files])
    one_or_several(args.image, reports, args.out, sample=args.sample, grid=args.grid)


def _curve(args: argparse.Namespace) -> None:
    import torch

    import vtp_kernels as vtp
    from vtp_kernels.contract.storage import read_json

    (path,) = args.files
    scores = read_json(path)
    if not (isinstance(scores, list) and scores and all(type(x) in (int, float) for x in scores)):
        raise ValueError(f"{path}: expected a list of numbers, the scores of a picture")
    curve = torch.tensor([scores], dtype=torch.float32)
    vtp.plot.curve((vtp.inflection(curve, rule=args.rule), curve), args.out)


def _layers(args: argparse.Namespace) -> None:
    from vtp_kernels import plot
    from vtp_kernels.contract.storage import read_json
    from vtp_kernels.models import Report

    reports: list[Report] = []
    counts: dict[str, Any] = {}
    for path in args.files:
        plain = read_json(path)
        if isinstance(plain, Mapping) and "rows" in plain:
            if args.sample:
                raise ValueError(f"--sample: {path} has the first prompt alone")
            for row in _rows(path, plain, ("method", "visual_tokens_per_layer")):
                _add(counts, row["method"], row["visual_tokens_per_layer"], str(path))
        else:
            reports.append(Report.load(path))
    for name, report in _named(reports).items():
        _add(counts, name, report, "a report")
    plot.layers(counts, args.out, sample=args.sample)


def _tradeoff(args: argparse.Namespace) -> None:
    from vtp_kernels import plot
    from vtp_kernels.contract.storage import read_json

    wanted = ("method", "prefill_flops_reduction", "exact_match")
    points: dict[str, Any] = {}
    for path in args.files:
        for row in _rows(path, read_json(path), wanted):
            name, *shares = (row[key] for key in wanted)
            _add(points, name, tuple(shares), str(path))
    plot.tradeoff(points, args.out)


def _rows(path: Path, plain: Any, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = plain.get("rows") if isinstance(plain, Mapping) else None
    if not rows or not all(isinstance(row, Mapping) and row.keys() >= set(keys) for row in rows):
        raise ValueError(f'{path}: expected {{"rows": [...]}}, each row with {", ".join(keys)}')
    return rows


def _add(found: dict[str, Any], name: str, value: Any, where: str) -> None:
    """The same twice is once; two results of one name cannot both be drawn."""
    if found.setdefault(name, value) != value:
        raise ValueError(f"{where} has other numbers for {name!r} than a file before it")


def _named(reports: list[Any]) -> dict[str, Any]:
    """Reports by the method of each, in words."""
    from vtp_kernels.plot.names import of_reports

    names = of_reports(reports)
    if len(set(names)) < len(names):
        raise ValueError(f"files: expected reports of different methods, got {', '.join(names)}")
    return dict(zip(names, reports, strict=True))
