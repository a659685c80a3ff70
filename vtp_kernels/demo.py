"""Dense beside pruned on one picture: answers, tokens, FLOPs, KV memory, time, what was kept.

`compare` works with any supported model and processor; `pocket` brings the small trained LLaVA and
a picture of its world.
"""

import contextlib
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from PIL import Image
from tqdm import tqdm

from vtp_kernels import plot
from vtp_kernels.chat import chat_inputs, greedy_answers, token_texts
from vtp_kernels.methods import Schedule
from vtp_kernels.models import prune
from vtp_kernels.models.pictures.grids import PictureGrid, picture_grids
from vtp_kernels.pictures import check_file, check_writable, load_image
from vtp_kernels.plot.tokens import one_or_several
from vtp_kernels.terminal import columns

DENSE = "dense"


@dataclass
class Row:
    """One method on every prompt. Tokens: first row of the batch; FLOPs, KV bytes: all of it."""

    method: str
    answers: list[str]
    visual_tokens_per_layer: list[int]
    flops_reduction: float | None
    kv_bytes: int
    prefill_ms: list[float] = field(default_factory=list)
    prefill_speedup: float = 1.0
    correct: int | None = None

    def flops(self) -> str:
        if self.flops_reduction is None:
            return "not known"
        return f"-{100 * self.flops_reduction:.0f} %" if self.flops_reduction else ""

    def stages(self) -> str:
        """Visual tokens as they enter the layers: "256 x2, 128 x6"."""
        runs = itertools.groupby(self.visual_tokens_per_layer)
        return ", ".join(f"{tokens} x{len(list(layers))}" for tokens, layers in runs)


@dataclass
class Comparison:
    prompts: list[str]
    rows: list[Row]
    expected: list[str] | None
    picture: str | None = None
    """The file with what was kept, if one was written."""
    not_drawn: str | None = None
    """Why there is none, where one was asked for."""
    page: str | None = None
    """The HTML file with what was kept, if one was written."""

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return columns(*self.table())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows."""
        head = ["method", *self.prompts, "visual tokens x layers", "FLOPs", "KV cache", "prefill"]
        body = [
            [
                row.method,
                *(self._marked(i, answer) for i, answer in enumerate(row.answers)),
                row.stages(),
                row.flops(),
                f"{row.kv_bytes / 1024:,.0f} KiB",
                f"{row.prefill_speedup:.2f}x",
            ]
            for row in self.rows
        ]
        if self.expected is not None:
            body.insert(0, ["(truth)", *self.expected, "", "", "", ""])
        return head, body

    def _marked(self, i: int, answer: str) -> str:
        wrong = self.expected is not None and answer != self.expected[i]
        return f"{answer} (wrong)" if wrong else answer


def compare(
    model,
    processor,
    image,
    prompts: list[str],
    methods: dict,
    *,
    expected: list[str] | None = None,
    max_new_tokens: int = 32,
    repeats: int = 9,
    picture: str | os.PathLike | None = None,
    page: str | os.PathLike | None = None,
    videos: Sequence = (),
    frames_a_second: float | None = None,
) -> Comparison:
    """Answers every prompt about the same pictures in one batch, dense and with each method.

    Methods, pictures, `picture` and `page` are checked before anything is computed.

    Args:
        model: a model of a supported family, in eval mode.
        processor: its processor.
        image: a path or a PIL image, or a sequence of them: all of them come before each question.
        prompts: one question a row of the batch.
        methods: label -> method.
        expected: the true answers, if they are known.
        max_new_tokens: length of an answer at most.
        repeats: timed prefills of each method, taken in turn; the speed-up is the median of the
            ratios to the dense prefill of the same turn.
        picture: where to write the PNG of what was kept for the first prompt. Where it is not known
            which token shows what, none is written, and the comparison says why.
        page: where to write the HTML page of what was kept, for all prompts; likewise.
        videos: sequences of frames, paths or PIL images: all of them come behind the pictures, of
            which there may then be none.
        frames_a_second: of the videos, for models that are told when a frame was; None: what the
            processor takes it for.

    Raises:
        ValueError, TypeError, NotImplementedError: the model, or one of the methods in it, is not
            supported; there is no question, or no picture and no video; the processor takes no
            videos.
        OSError: a picture cannot be read, or `picture` or `page` cannot be written.
        ImportError: there is a `picture` to draw, and no matplotlib.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one question, got none")
    if picture is not None:
        check_writable(picture, "picture")
        plot.check_matplotlib()
    if page is not None:
        check_file(page, "page")
    for method in (Schedule({}), *methods.values()):
        prune(model, method).remove()
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images and not videos:
        raise ValueError("image: expected at least one picture or video, got none")
    if videos and getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f"videos: a {type(processor).__name__} takes none; give the frames as pictures"
        )
    loaded = [load_image(one) for one in images]
    clips = [[load_image(frame) for frame in video] for video in videos]
    asked = [loaded] * len(prompts), prompts, [clips] * len(prompts)
    inputs = chat_inputs(processor, *asked, frames_a_second).to(model.device)
    for name in ("pixel_values", "pixel_values_videos"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].to(model.dtype)
    grids, not_drawn = None, None
    if methods and not (picture is None and page is None):
        grids, not_drawn = _grids(model, processor, inputs, loaded, clips, len(prompts))
    rows, reports = [], {}
    for label, method in tqdm(
        {DENSE: None, **methods}.items(), desc="answering", leave=False, disable=None
    ):
        with pruned(model, method) as run:
            answers = greedy_answers(model, processor, inputs, max_new_tokens)
            if run is not None:
                report = run.report()
                reports[label] = report
        if run is None:
            report = _dense_report(model, inputs)
        rows.append(_row(label, answers, report, expected))
    _time_prefills(model, inputs, [None, *methods.values()], rows, repeats)
    files = {}
    if grids is not None:
        shown = [*loaded, *clips]
        names = plot.readable(list(reports))
        if picture is not None:
            named = dict(zip(names, reports.values(), strict=True))
            one_or_several(shown, named, picture, grids=grids)
            files["picture"] = os.fspath(picture)
        if page is not None:
            texts = token_texts(processor, inputs["input_ids"])
            given = {"prompt": texts, "names": names, "grids": grids}
            plot.page(shown, list(reports.values()), page, **given)
            files["page"] = os.fspath(page)
    return Comparison(prompts, rows, expected, not_drawn=not_drawn, **files)


def pocket(
    image=None,
    *,
    seed: int = 1,
    repeats: int = 9,
    picture: str | os.PathLike = "vtp_kept.png",
    page: str | os.PathLike | None = None,
) -> Comparison:
    """The small trained LLaVA answers one question of each kind about a picture new to it."""
    from vtp_kernels.pocket_llava import scenes
    from vtp_kernels.pocket_llava.model import TRAINED

    model, processor = load(TRAINED)
    drawn = scenes.scene("demo", seed)
    rng = scenes.generator("demo", 1_000_000 + seed)
    questions = [scenes.ask(drawn, rng, kind) for kind in scenes.KINDS]
    return compare(
        model,
        processor,
        Image.fromarray(drawn.image) if image is None else image,
        [question.text for question in questions],
        pocket_methods(),
        expected=[question.answer for question in questions] if image is None else None,
        max_new_tokens=4,
        repeats=repeats,
        picture=picture,
        page=page,
    )


def pocket_methods() -> dict:
    """Every method, at settings that suit a model of 8 layers."""
    from vtp_kernels.methods import (
        FastV,
        InflectionPruning,
        LVPruning,
        PyramidDrop,
        RandomPruning,
        VisiPruner,
    )
    from vtp_kernels.pocket_llava.model import DECIDERS

    return {
        "VisiPruner": VisiPruner(("middle",), 0, 0.9999, 0.027, min_keep=28),
        "LVPruning": LVPruning(DECIDERS / "seed-1", (1, 2, 4), (0.6, 0.4, 0.1)),
        "Inflection": InflectionPruning(
            "attention", "kneedle", min_keep=32, llm_layers=(2,), visual_keep=0.75, text_keep=1.0
        ),
        "FastV": FastV(layer=2, keep=0.5),
        "PyramidDrop": PyramidDrop(layers=(3, 5, 6), keep=(0.5, 0.25, 0.125)),
        "random": RandomPruning(layer=0, keep=0.22),
    }


def load(path: str | os.PathLike, *, device: str | None = None, dtype: str = "auto"):
    """(model, processor) from a folder or a hub name; weights from safetensors only.

    On a CPU, float16 checkpoints are computed in float32: CPUs have no fast float16 arithmetic.
    Weights that the model has no place for are left out, with a warning.

    Raises:
        ValueError: the checkpoint lacks weights of the model or has them in other shapes, which
            would then be random; it cannot be read; or `device` is not there.
        OSError: there is no such checkpoint.
    """
    from transformers import AutoProcessor

    device = device_of(device)
    processor = AutoProcessor.from_pretrained(path)
    model = _from_pretrained(path, dtype=dtype)
    if device.type == "cpu" and dtype == "auto" and model.dtype == torch.float16:
        model = model.float()
    return model.to(device).eval(), processor


def check_checkpoint(path: str | os.PathLike) -> None:
    """Raise ValueError, as `load` does, for one that is not all there; no weights are loaded."""
    _from_pretrained(path, device_map="meta")


def _from_pretrained(path: str | os.PathLike, **settings):
    """A model whose weights are all in its checkpoint."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them
            **settings,
        )
    except SafetensorError as error:
        raise ValueError(f"model: the weights of {str(path)!r} cannot be read: {error}") from error
    _check_weights(path, loading)
    return model


def _check_weights(path: str | os.PathLike, loading: dict) -> None:
    """Raise ValueError if a model is not all there, by transformers' loading info."""
    faults = [
        (f"{str(path)!r} has no weights for", loading["missing_keys"]),
        (
            f"{str(path)!r} has weights of another shape for",
            [key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]],
        ),
    ]
    for what, keys in faults:
        if keys:
            raise ValueError(
                f"model: {what} {_named(keys)}; with random ones it would answer nonsense"
            )
    if loading["unexpected_keys"]:
        warnings.warn(
            f"model: weights of {str(path)!r} that the model has no place for are left out: "
            f"{_named(loading['unexpected_keys'])}",
            stacklevel=4,
        )


def _named(keys, most: int = 4) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def device_of(name: str | None) -> torch.device:
    """The device of that name; None: the GPU if there is one. ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} is not there: {reason}") from error
    if device.type == "meta":
        raise ValueError("device: 'meta' holds no weights to compute with")
    return device


def pruned(model, method, **settings):
    """`prune` for a `with` block, or with None the model as it is, which yields None."""
    return contextlib.nullcontext() if method is None else prune(model, method, **settings)


def _grids(
    model, processor, inputs, images: list, videos: list, copies: int
) -> tuple[list[PictureGrid] | None, str | None]:
    """The grids of all pictures and frames of prompts that have the same, or why they are not
    known."""
    come_as_pictures = bool(videos) and inputs.get("pixel_values_videos") is None
    frames = [frame for video in videos for frame in video]
    given = {"images": (images + frames if come_as_pictures else images) * copies or None}
    if videos and not come_as_pictures:
        given["videos"] = videos * copies
    try:
        grids = picture_grids(model, inputs, **given, processor=processor)
    except (NotImplementedError, ValueError) as error:
        return None, str(error)
    if come_as_pictures:
        of_video = [(v, f) for v, video in enumerate(videos) for f in range(len(video))]
        number_of = [None] * len(images) + of_video
        grids = [
            grid
            if place is None
            else grid._replace(video=place[0], frames=range(place[1], place[1] + 1))
            for grid, place in zip(grids, number_of * copies, strict=True)
        ]
    return grids, None


def _dense_report(model, inputs):
    """What an empty schedule reports is the dense model."""
    with torch.no_grad(), prune(model, Schedule({})) as run:
        model(**inputs, logits_to_keep=1)
    return run.report()


def _row(label: str, answers: list[str], report, expected) -> Row:
    return Row(
        method=label,
        answers=answers,
        visual_tokens_per_layer=[layer[0] for layer in report.visual_tokens_per_layer],
        flops_reduction=report.flops_reduction,
        kv_bytes=report.kv_bytes,
        correct=None
        if expected is None
        else sum(a == e for a, e in zip(answers, expected, strict=True)),
    )


@torch.no_grad()
def _time_prefills(model, inputs, methods: list, rows: list[Row], repeats: int) -> None:
    """Methods take turns, so that a machine that slows down slows all of them down."""
    for turn in tqdm(range(repeats + 1), desc="timing prefills", leave=False, disable=None):
        for method, row in zip(methods, rows, strict=True):
            with pruned(model, method):
                _synchronize(model)
                start = time.perf_counter()
                model(**inputs, logits_to_keep=1)
                _synchronize(model)
                seconds = time.perf_counter() - start
            if turn:  # the first turn warms up
                row.prefill_ms.append(1e3 * seconds)
    for row in rows:
        ratios = [d / p for d, p in zip(rows[0].prefill_ms, row.prefill_ms, strict=True)]
        row.prefill_speedup = statistics.median(ratios)


def _synchronize(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
