"""What a method saves in a model, from the model's configuration alone: `vtp-kernels flops`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.flop_counts.text import DecoderLayer, decoder_layers
from vtp_kernels.flops import Attention, Spans, flops, passive_attention, visual_pairs
from vtp_kernels.methods import LVPruning, Method, VisiPruner
from vtp_kernels.methods.budget import visual_budget
from vtp_kernels.methods.chain import parts_of as methods_of
from vtp_kernels.methods.stages import BudgetedMethod
from vtp_kernels.methods.videos import VideoMethod

if TYPE_CHECKING:
    from vtp_kernels.models.families import ModelParts

__all__ = [
    "MODELS",
    "Account",
    "Course",
    "account",
    "accounts",
    "table",
    "text_config",
]

#: Language models of well-known checkpoints: what FLOPs depend on.
MODELS = {
    "llava-1.5-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llava-1.5-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}


@dataclass(frozen=True)
class Course:
    """What a picture makes VisiPruner do: fusion in a layer, tokens kept, exit in a layer or None.

    The defaults are one of the courses with the published saving: visual tokens matter up to layer
    14 and are gone from layer 15 on.
    """

    fusion_layer: int = 14
    kept: int = 0
    exit_layer: int | None = None


@dataclass(frozen=True)
class Account:
    """One prompt, one prefill of the language model.

    Attributes
    ----------
    visual_per_layer : [L]
        Visual tokens entering each layer.
    passive_layers : int
    flops : int
        All tokens; 2 per multiply-accumulate, as `vtp_kernels.flops`. LVPruning's deciders are
        counted too.
    visual_macs : float, or None
        Visual tokens alone, as VisiPruner counts (arXiv 2510.17205): 4 n d^2 + 2 n^2 d + 3 n d m
        multiply-accumulates per layer of n tokens; passive tokens that skip attention have the last
        term alone, those whose attention is exact only lack what text would read of them, which
        this count does not have. None where layers are not such: experts, no gate, linear
        attention, or a window that is shorter than the prompt.
    visual_pairs : int, or None
        Causal pairs of a query and a key that have weight, with a visual token among them; linear
        attention has none. None where a layer's window is shorter than the prompt, for which pairs
        it holds depends on which tokens stay, and where rows see some that come after them.
    visual_reads : int, or None
        Those of them in which text reads a visual token, in layers that are not passive. As a share
        of the dense model's `visual_pairs` it is what VisiPruner's paper seems to count: what
        visual tokens pay each other is needed nowhere. Its 98.3 to 99.9 % less come out for 21 to 1
        tokens of text behind the picture with fusion in layer 14, for 51 to 3 with fusion in 9.
    """

    visual_per_layer: list[int]
    passive_layers: int
    flops: int
    visual_macs: float | None
    visual_pairs: int | None
    visual_reads: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def model_config(model: str) -> Any:
    """The configuration of a name in MODELS, a folder, or a hub name."""
    if model in MODELS:  # transformers takes longer to load than all else
        return SimpleNamespace(model_type="llama", vocab_size=32064, **MODELS[model])
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def text_config(model: str) -> Any:
    """The same of the language model alone."""
    config = model_config(model)
    return getattr(config, "text_config", config)


def weightless_parts(config: Any) -> ModelParts | None:
    """The parts of a model of that configuration, none of whose weights exist. None for a language
    model alone. Raises NotImplementedError for models that are not supported."""
    if not hasattr(config, "text_config"):
        return None  # without loading what knows of models
    import torch
    import transformers

    from vtp_kernels.models.families import FAMILIES, parts_of

    page = FAMILIES.get(config.model_type)
    if page is None:
        return None
    with torch.device("meta"):
        return parts_of(getattr(transformers, page.architectures[0])._from_config(config))


def accounts(
    config: Any, methods: dict[str, Method | None], **prompt: Any
) -> dict[str, Account | str]:
    """`account` for each method; in place of one that cannot be counted, why not.

    `config` is the whole model's or its language model's, `prompt` as for `account`.
    """
    text = getattr(config, "text_config", config)
    parts = weightless_parts(config)
    counted: dict[str, Account | str] = {}
    for name, method in methods.items():
        try:
            if method is not None:
                _check_method(method, text, parts)
        except (NotImplementedError, ValueError) as error:
            counted[name] = str(error)
            continue
        try:
            counted[name] = account(text, method, **prompt)
        except NotImplementedError as error:
            counted[name] = str(error)
            continue
        if parts is not None and parts.page.sees_ahead:  # pairs are counted as causal ones
            counted[name] = replace(counted[name], visual_pairs=None, visual_reads=None)
    return counted


def _check_method(method: Method, text: Any, parts: ModelParts | None) -> None:
    """Raise if a method does not fit a model; of a language model alone its depth is known."""
    if parts is None:
        method.check_model(text.num_hidden_layers)
        return
    from vtp_kernels.models.passage.limits import check_method

    check_method(parts, method, "original")


def account(
    config: Any, method: Method | None, *, text: int, before: int, visual: int, course: Course
) -> Account:
    """What `method` (None: nothing leaves) costs for `visual` tokens among `text`, `before` of
    these before the picture.

    Raises ValueError for prompts and courses that cannot be, NotImplementedError for methods and
    language models that cannot be counted.
    """
    _check_prompt(text, before, visual)
    layers = decoder_layers(config)
    depth = len(layers)
    if method is not None:
        method.check_model(depth)
    counts = _visual_per_layer(method, depth, visual, course)
    passive = {} if method is None else method.passive_layers(depth)
    attention: dict[int, Attention] = {
        layer: passive_attention(text=text, visual=counts[layer], before_visual=before, passive=how)
        for layer, how in passive.items()
    }
    spent = flops(config, [text + n for n in counts], visual=counts, attention=attention)
    pairs = reads = 0
    for layer, n in enumerate(counts):
        if not layers[layer].pair:
            continue
        if layer in passive:
            pairs += visual_pairs(n, Spans(before, n * before, text - before), passive[layer])
        else:
            reads += n * (text - before)
            pairs += n * text + n * (n + 1) // 2
    windows = any(x.window is not None and x.window < text + visual for x in layers)
    return Account(
        visual_per_layer=counts,
        passive_layers=len(passive),
        flops=spent + _deciding(config, method, text, [visual, *counts]),
        visual_macs=None if windows else _visual_macs(config, layers, counts, passive),
        visual_pairs=None if windows else pairs,
        visual_reads=None if windows else reads,
    )


def _visual_macs(
    config: Any, layers: list[DecoderLayer], counts: list[int], passive: dict[int, PassiveVisual]
) -> int | None:
    width, inner = config.hidden_size, config.intermediate_size
    if any(not layer.pair or layer.mlp != 3 * width * inner for layer in layers):
        return None
    macs = 0
    for layer, n in enumerate(counts):
        macs += 3 * n * width * inner
        if layer not in passive or not passive[layer].leaves_one:
            macs += 4 * n * width**2 + 2 * n**2 * width
    return macs


def _deciding(config: Any, method: Method | None, text: int, counts: list[int]) -> int:
    """FLOPs of the method's own networks; counts[layer] visual tokens enter the layer before."""
    layers = () if method is None else method.decision_layers(config.num_hidden_layers)
    return sum(
        method.decision_flops(layer, config, text, counts[layer], counts[layer + 1])
        for layer in layers
    )


def _visual_per_layer(method: Method | None, depth: int, visual: int, course: Course) -> list[int]:
    """As few as any method of a chain leaves: shares are of all tokens."""
    each = [_left_by(part, depth, visual, course) for part in methods_of(method)]
    return [min(counts) for counts in zip([visual] * depth, *each, strict=True)]


def _left_by(method: Method, depth: int, visual: int, course: Course) -> list[int]:
    counts = [visual] * depth
    if isinstance(method, VisiPruner) and method.schedule is not None:
        method = method.schedule
    if isinstance(method, BudgetedMethod | VideoMethod):
        if isinstance(method, VideoMethod) or method.per == "frame":
            raise NotImplementedError(
                f"what {method.name} keeps of each frame depends on how many there are: prune a "
                "model and ask report()"
            )
        for stage in method.stages:
            kept = visual_budget(stage.keep, visual)
            counts[stage.layer :] = [min(kept, n) for n in counts[stage.layer :]]
    elif isinstance(method, LVPruning):
        for layer in method.layers:
            counts[layer:] = [method.budget(layer, visual)] * (depth - layer)
    elif isinstance(method, VisiPruner):
        _check_course(method, course, depth, visual)
        later = 2 if method.decision == "pipelined" else 1
        if "middle" in method.stages:
            _leave(counts, course.fusion_layer + later, course.kept)
        if "deep" in method.stages and course.exit_layer is not None:
            _leave(counts, course.exit_layer + later, 0)
    else:
        raise NotImplementedError(
            f"what {method.name} keeps depends on the picture: prune a model and ask report()"
        )
    return counts


def _leave(counts: list[int], layer: int, kept: int) -> None:
    """So many are left from `layer` on."""
    counts[layer:] = [kept] * len(counts[layer:])


def _check_course(method: VisiPruner, course: Course, depth: int, visual: int) -> None:
    """Whether the method can go through it: what is judged, and when votes for the exit begin."""
    judged = method.observed_layers(depth)
    if not judged:
        return
    fuses, leaves = "middle" in method.stages, "deep" in method.stages
    if fuses:
        _check_layer("fusion_layer", course.fusion_layer, judged[0], judged[-1])
        least = min(method.min_keep, visual)
        if not least <= course.kept <= visual:
            raise ValueError(f"kept: expected {least} to {visual} tokens, got {course.kept}")
    if leaves and course.exit_layer is not None:
        first = (course.fusion_layer + 1 if fuses else judged[0]) + method.exit_votes - 1
        _check_layer("exit_layer", course.exit_layer, first, judged[-1])


def _check_layer(name: str, layer: int, first: int, last: int) -> None:
    if not first <= layer <= last:
        raise ValueError(f"{name}: expected a layer from {first} to {last}, got {layer}")


def _check_prompt(text: int, before: int, visual: int) -> None:
    for name, value, least in (("text", text, 1), ("visual", visual, 1), ("before", before, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least} tokens, got {value}")
    if before > text:
        raise ValueError(f"before: expected at most the {text} tokens of text, got {before}")


def table(accounts: dict[str, Account | str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one a method that could be counted. The first of them is what the others are
    compared with."""
    counted = {name: x for name, x in accounts.items() if not isinstance(x, str)}
    first = next(iter(counted.values()))
    head = ["method", "FLOPs", "MACs of visual tokens", "visual attention", "read by text"]
    rows = []
    for name, x in counted.items():
        cells = [_cell(x.flops, first.flops, x is first)]
        cells.append(_cell(x.visual_macs, first.visual_macs, x is first))
        for part in (x.visual_pairs, x.visual_reads):
            cells.append("" if x is first else _less(part, first.visual_pairs) or "not known")
        rows.append([name, *cells, _runs(x)])
    return [*head, "visual tokens x layers"], rows


def not_counted(accounts: dict[str, Account | str]) -> list[str]:
    """Why methods could not be counted, a line each."""
    return [f"{name}: {why}" for name, why in accounts.items() if isinstance(why, str)]


def _cell(macs: float | None, of: float | None, alone: bool) -> str:
    if macs is None:
        return "not known"
    return f"{macs / 1e12:.2f} T" + ("" if alone else f"  {_less(macs, of)}")


def _less(part: float | None, of: float | None) -> str | None:
    return None if part is None or of is None else f"-{1 - part / of:.1%}"


def _runs(x: Account) -> str:
    """As 576 x15, 0 x17 (6 passive)."""
    runs = ", ".join(f"{n} x{len(list(run))}" for n, run in itertools.groupby(x.visual_per_layer))
    return runs + (f" ({x.passive_layers} passive)" if x.passive_layers else "")
