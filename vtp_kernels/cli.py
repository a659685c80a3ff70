"""The command line: `python -m vtp_kernels demo | run | serve | info | models | flops | ...`."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import vtp_kernels as vtp
from vtp_kernels import terminal


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command is not _bench:  # whose arguments the benchmarks know
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        status = args.command(args)
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"vtp-kernels {args.name}: {error}", file=sys.stderr)
        return 2
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtp-kernels", description="Visual-token pruning that is really faster."
    )
    parser.add_argument("--version", action="version", version=vtp.__version__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="command")

    demo = commands.add_parser(
        "demo", help="a small trained LLaVA answers about a picture, dense and pruned"
    )
    demo.add_argument(
        "--image",
        type=Path,
        help="a picture of your own (default: one of the model's world is drawn)",
    )
    demo.add_argument(
        "--seed", type=int, default=1, help="which picture is drawn, and which questions are asked"
    )
    demo.add_argument(
        "--html",
        type=Path,
        default=Path("vtp_kept.html"),
        help="a page of what was kept, to go through layer by layer",
    )
    demo.set_defaults(command=_demo)

    run = commands.add_parser(
        "run", help="the same with a checkpoint, a picture and a method of your own"
    )
    run.add_argument("--model", required=True, help="a folder or a hub name")
    run.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="may be given several times: all of them come before each question",
    )
    run.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        help="a folder of frames, or a picture that moves (GIF, WebP, PNG); several as --image",
    )
    run.add_argument(
        "--frames",
        type=_positive,
        default=64,
        help="of a longer video so many frames are taken, evenly (default: 64)",
    )
    run.add_argument(
        "--frames-a-second",
        type=_rate,
        help="of those taken, for models that are told when a frame was",
    )
    run.add_argument(
        "--prompt", required=True, action="append", help="may be given several times: one batch"
    )
    run.add_argument(
        "--method",
        action="append",
        help=f"{METHOD} (default: fastv); may be given several times: a row of the table each",
    )
    run.add_argument("--max-new-tokens", type=_positive, default=64)
    run.add_argument(
        "--html", type=Path, help="write a page of what was kept, to go through layer by layer"
    )
    run.set_defaults(command=_run)

    serve = commands.add_parser(
        "serve", help="transformers' OpenAI-compatible server, with a method at work in the model"
    )
    serve.add_argument("--model", required=True, help="a folder or a hub name")
    serve.add_argument("--method", required=True, action=_Once, help=METHOD)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    serve.add_argument("--port", type=_port, default=8000, help="0: one that is free")
    serve.set_defaults(command=_serve)

    for command in (run, serve):
        command.add_argument("--device", help="default: the GPU if there is one")
        command.add_argument(
            "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
        )

    for command in (demo, run):
        command.add_argument(
            "--out", type=Path, default=Path("vtp_kept.png"), help="the picture of what was kept"
        )
        command.add_argument(
            "--repeats", type=_positive, default=9, help="timed prefills of each method"
        )
        command.add_argument("--json", action="store_true", help="print the table as JSON")

    info = commands.add_parser(
        "info", help="versions, device, and which backend each op would use, and why"
    )
    info.add_argument("--json", action="store_true")
    info.set_defaults(command=_info)

    models = commands.add_parser(
        "models", help="which models are taken and what each can run; which are not, and why"
    )
    models.add_argument("--json", action="store_true")
    models.set_defaults(command=_models)

    selftest = commands.add_parser(
        "selftest", help="every op on every backend here against the reference, in seconds"
    )
    selftest.add_argument("--seed", type=_count, help="of the random inputs (default: another)")
    selftest.set_defaults(command=_selftest)

    flops = commands.add_parser(
        "flops", help="what methods save in a model's prefill, from its configuration alone"
    )
    flops.add_argument(
        "--model", required=True, help="llava-1.5-7b, llava-1.5-13b, a folder or a hub name"
    )
    flops.add_argument("--method", required=True, nargs="+", help="as for run; visipruner, ...")
    flops.add_argument("--visual", type=_positive, default=576, help="visual tokens")
    flops.add_argument("--text", type=_positive, default=64, help="other tokens")
    flops.add_argument(
        "--before",
        type=_count,
        help="how many of these come before the picture (default: 35, or all if there are fewer)",
    )
    flops.add_argument(
        "--fusion-layer", type=int, help="visipruner: where fusion happens (default: 14)"
    )
    flops.add_argument("--kept", type=int, help="visipruner: tokens left then (default: 0)")
    flops.add_argument(
        "--exit-layer", type=int, help="visipruner: where these leave too (default: nowhere)"
    )
    flops.add_argument("--json", action="store_true")
    flops.set_defaults(command=_flops)

    bench = commands.add_parser(
        "bench",
        help="every op beside what would be used instead, in a copy of the source repository",
        add_help=False,
    )
    bench.set_defaults(command=_bench)

    from vtp_kernels import drawing
    from vtp_kernels.methods.lvpruning import cli as lvpruning

    drawing.add_to(commands)
    lvpruning.add_to(commands)
    return parser


class _Once(argparse.Action):
    """An option that counts once: argparse would take the last without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string}: expected one, got {before!r} and {values!r}")
        setattr(namespace, self.dest, values)


METHOD = "none, fastv, fastv:2:0.5, random:0.22, ... or a JSON file"


def _port(text: str) -> int:
    value = _count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"expected at most 65535, got {value}")
    return value


def _positive(text: str) -> int:
    return _count(text, least=1)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _count(text: str, least: int = 0) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
    return value


def _demo(args: argparse.Namespace) -> None:
    from vtp_kernels import demo
    from vtp_kernels.pictures import check_file, check_writable

    check_writable(args.out, "--out")
    check_file(args.html, "--html")
    comparison = demo.pocket(
        args.image, seed=args.seed, repeats=args.repeats, picture=args.out, page=args.html
    )
    _print(comparison, args.json)


def _run(args: argparse.Namespace) -> None:
    from vtp_kernels import demo, plot
    from vtp_kernels.methods import method_from_spec
    from vtp_kernels.pictures import check_file, check_writable, load_frames, load_image

    # What can be wrong without the model is found out before it is loaded.
    if not args.image and not args.video:
        raise ValueError("--image, --video: expected at least one of them")
    methods = {spec: method_from_spec(spec) for spec in args.method or ["fastv"]}
    images = [load_image(path) for path in args.image]
    videos = [load_frames(path, args.frames) for path in args.video]
    check_writable(args.out, "--out")
    plot.check_matplotlib()
    if args.html is not None:
        check_file(args.html, "--html")
    demo.device_of(args.device)
    model, processor = demo.load(args.model, device=args.device, dtype=args.dtype)
    comparison = demo.compare(
        model,
        processor,
        images,
        args.prompt,
        {spec: method for spec, method in methods.items() if method is not None},
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        picture=args.out,
        page=args.html,
        videos=videos,
        frames_a_second=args.frames_a_second,
    )
    _print(comparison, args.json)


def _serve(args: argparse.Namespace) -> None:
    from vtp_kernels import serve
    from vtp_kernels.methods import method_from_spec

    serve.serve(
        args.model,
        method_from_spec(args.method),
        host=args.host,
        port=args.port,
        device=args.device,
        dtype=args.dtype,
    )


def _info(args: argparse.Namespace) -> None:
    info = vtp.info()
    print(json.dumps(info.to_dict(), indent=2) if args.json else info)


def _models(args: argparse.Namespace) -> None:
    from vtp_kernels.catalogue import catalogue

    found = catalogue()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)


def _selftest(args: argparse.Namespace) -> int:
    from vtp_kernels import selftest

    return selftest.main(args.seed)


def _flops(args: argparse.Namespace) -> None:
    from vtp_kernels import accounting
    from vtp_kernels.methods import VisiPruner, method_from_spec
    from vtp_kernels.methods.chain import parts_of

    methods = {spec: method_from_spec(spec) for spec in ("none", *args.method)}
    given = {name: getattr(args, name) for name in ("fusion_layer", "kept", "exit_layer")}
    given = {name: value for name, value in given.items() if value is not None}
    parts = [part for method in methods.values() for part in parts_of(method)]
    if given and not any(isinstance(part, VisiPruner) for part in parts):
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option}: is of visipruner, which is not among the methods")
    accounts = accounting.accounts(
        accounting.model_config(args.model),
        methods,
        text=args.text,
        before=min(35, args.text) if args.before is None else args.before,
        visual=args.visual,
        course=accounting.Course(**given),
    )
    if all(isinstance(x, str) for x in accounts.values()):
        raise NotImplementedError(accounts["none"])
    if args.json:
        plain = {
            spec: {"error": x} if isinstance(x, str) else x.to_dict()
            for spec, x in accounts.items()
        }
        print(json.dumps(plain, indent=2))
        return
    print(
        f"{args.model}: {args.visual} visual and {args.text} other tokens, prefill of the language "
        "model\n"
    )
    terminal.show(*accounting.table(accounts))
    for reason in accounting.not_counted(accounts):
        print(reason)


def _bench(args: argparse.Namespace) -> int:
    root = Path(vtp.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "harness.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks are in the source repository, and not beside the package in {root}: "
            "no wheel has them. Run this in a clone, where vtp_kernels was built: make bench, or "
            "python -m vtp_kernels bench"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.__main__").main(args.rest, "vtp-kernels bench")


def _print(comparison, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**comparison.to_dict(), "info": vtp.info().to_dict()}, indent=2))
        return
    terminal.show(*comparison.table())
    if comparison.picture:
        print(f"\nWhat was kept: {comparison.picture}")
    if comparison.page:
        print(f"Layer by layer, in a browser: {comparison.page}")
    if comparison.not_drawn:
        print(f"\nWhat was kept is not drawn: {comparison.not_drawn}")
