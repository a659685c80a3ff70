"""Floating-point operations of a prefill, from a model's configuration alone.

A multiplication and its addition count as 2. Counted are the matrix products, as torch's
FlopCounterMode does, with attention as the full square (what a kernel could skip by causality is
not subtracted); norms, activations, softmax and rotary embeddings stay below 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vtp_kernels.flop_counts.pictures import picture
from vtp_kernels.flop_counts.text import CHUNK, DecoderLayer, decoder_layers

if TYPE_CHECKING:
    from vtp_kernels.contract.passive import PassiveVisual

__all__ = [
    "Attention",
    "Spans",
    "flops",
    "layer_flops",
    "passive_attention",
    "passive_pairs",
    "visual_pairs",
]


class Attention(NamedTuple):
    """`rows` go through the projections; per head, `pairs` of a row with a key are multiplied for
    logits, or with a value for their weighted sum."""

    rows: int
    pairs: int


class Spans(NamedTuple):
    """Of one prompt: text before the last visual token, the sum over visual tokens of the text
    before each, and the text after the first."""

    before_last: int
    text_before: int
    text_after_first: int


def flops(
    config: Any,
    tokens: int | Sequence[int],
    *,
    visual: int | Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    attention: Mapping[int, Attention] | None = None,
    images: int | Sequence[tuple[int, int]] = 0,
    logits: int = 0,
) -> int:
    """FLOPs to prefill one prompt in the language model, and to see its images.

    Parameters
    ----------
    config : a transformers model or its config
        Of an image-text model, or of a text model alone.
    tokens : int, or one int per decoder layer
        Rows entering each layer: text and visual tokens together.
    visual : int, or one int per decoder layer, optional
        How many of these are visual tokens. Asked for by models that have experts for them alone
        (ERNIE 4.5 VL); to others it makes no difference.
    keys : one int per decoder layer, optional
        Keys each layer attends to, where that is more than its rows (a cache came along).
    attention : {layer: Attention}, optional
        What a layer's attention computes where that is not all rows with all keys; see
        `passive_attention`.
    images : int, or the (height, width) of each
        Images to count the vision tower and the projector for; 0 leaves them out. Crops and tiles
        are images of their own, two frames of a Qwen video are one. Where a tower sees images of
        all sizes, these are needed: in pixels, as it gets them.
    logits : int
        Rows that go through the output embedding (generate() computes 1); 0 leaves it out.

    Returns
    -------
    int
        FLOPs, 2 per multiply-accumulate. A row of a sliding layer is counted with the keys of its
        window, of linear attention with the products that torch's own code makes of 64 rows each.

    Raises
    ------
    NotImplementedError
        For language models, and with images for towers, whose layers were not looked at.
    ValueError
        For numbers that do not fit, or that are needed and not given.

    Examples
    --------
    LLaVA-1.5-7B, 576 visual and 64 text tokens, dense: 8.504e12 (4.252 TMAC):

        vtp.flops(AutoConfig.from_pretrained("llava-hf/llava-1.5-7b-hf"), 576 + 64)
    """
    config = getattr(config, "config", config)
    text = getattr(config, "text_config", config)
    spent = sum(layer_flops(text, tokens, visual=visual, keys=keys, attention=attention))
    if isinstance(images, int):
        macs = images * picture(config) if images else 0
    else:
        macs = sum(picture(config, size) for size in images)
    macs += logits * text.hidden_size * text.vocab_size
    return spent + 2 * macs


def layer_flops(
    text: Any,
    tokens: int | Sequence[int],
    *,
    visual: int | Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    attention: Mapping[int, Attention] | None = None,
) -> list[int]:
    """The same of each decoder layer alone. `text` is the language model's config."""
    layers = decoder_layers(text)
    rows = [tokens] * len(layers) if isinstance(tokens, int) else list(tokens)
    keys = rows if keys is None else list(keys)
    shown = _visual(text, layers, visual)
    for name, given in (("tokens", rows), ("visual", shown), ("keys", keys)):
        if len(given) != len(layers):
            raise ValueError(f"{name}: got {len(given)} numbers for {len(layers)} decoder layers")
    spent = []
    for index, (layer, n, v, m) in enumerate(zip(layers, rows, shown, keys, strict=True)):
        of_layer = (attention or {}).get(index)
        if of_layer is not None:
            _check_attention(index, layer, m)
        if not 0 <= v <= n:
            raise ValueError(f"visual: expected 0 to {n} of the tokens of layer {index}, got {v}")
        spent.append(2 * _decoder_layer(layer, n, v, m, of_layer))
    return spent


def _visual(text: Any, layers: list[DecoderLayer], visual: Any) -> list[int]:
    """Visual tokens entering each layer; 0 where it makes no difference."""
    if visual is None:
        if any(layer.visual_mlp is not None for layer in layers):
            raise ValueError(
                f"visual: a {text.model_type!r} language model has experts for visual tokens "
                "alone; say how many of the tokens are such, or 0"
            )
        return [0] * len(layers)
    return [visual] * len(layers) if isinstance(visual, int) else list(visual)


def passive_attention(
    *,
    text: int,
    visual: int,
    before_visual: int,
    past: int = 0,
    passive: PassiveVisual,
) -> Attention:
    """What a layer with passive visual tokens computes for one prompt.

    Parameters
    ----------
    text, visual : int
        Rows of the prompt.
    before_visual : int
        Rows of text before the last visual token: what visual_rows="prefix" attends to.
    past : int
        Keys from before the prompt, which count as text.
    passive : how visual tokens are passive
    """
    if passive.leaves_one:
        rows = text + min(visual, 1)
        return Attention(rows, 2 * rows * (past + rows))
    options = {"past": past, "sink": passive.sink, "renormalize": passive.renormalize}
    pairs = passive_pairs(
        text=text,
        visual=visual,
        before_visual=before_visual,
        visual_rows=passive.visual_rows,
        **options,
    )
    if passive.spare_second_half:  # once more, with the second half among the text
        half = visual // 2
        pairs += passive_pairs(
            text=text + visual - half, visual=half, before_visual=0, visual_rows="skip", **options
        )
    return Attention(text + visual, pairs)


def passive_pairs(
    *,
    text: int,
    visual: int,
    before_visual: int,
    past: int = 0,
    sink: str,
    visual_rows: str,
    renormalize: bool,
) -> int:
    """The `pairs` of one call of `vtp_kernels.passive_attention`, for one prompt."""
    keys = past + text
    merged = 1 if sink == "merge" and visual else 0
    logits = text * (keys + merged if renormalize else keys + visual)
    values = text * (keys + merged)
    visual_keys = {"prefix": past + before_visual, "causal": keys + visual, "skip": 0}
    return logits + values + 2 * visual * visual_keys[visual_rows]


def visual_pairs(visual: int, spans: Spans, passive: PassiveVisual) -> int:
    """Of one prompt in a passive layer: causal pairs of a query and a key that have weight, with a
    visual token among them."""
    visual_rows = {
        "prefix": spans.text_before,
        "causal": spans.text_before + visual * (visual + 1) // 2,
        "skip": 0,
    }[passive.visual_rows]
    keys = (visual + 1) // 2 if passive.spare_second_half else int(passive.sink == "merge")
    return visual_rows + spans.text_after_first * keys


def _check_attention(index: int, layer: DecoderLayer, keys: int) -> None:
    """What a layer's attention computes can be said only where it goes over all keys."""
    if layer.pair and (layer.window is None or keys <= layer.window):
        return
    what = f"sees {layer.window} of {keys} keys" if layer.pair else "is linear, or a convolution"
    raise NotImplementedError(
        f"attention: of layer {index}, whose attention {what}, FLOPs with passive visual tokens "
        "are not known"
    )


def _decoder_layer(
    layer: DecoderLayer, rows: int, visual: int, keys: int, attention: Attention | None
) -> int:
    if attention is None:
        attention = Attention(rows, 2 * rows * min(keys, layer.window or keys))
    chunks = -(-rows // CHUNK)
    visual_mlp = layer.mlp if layer.visual_mlp is None else layer.visual_mlp
    return (
        attention.rows * layer.projections
        + attention.pairs * layer.pair
        + chunks * layer.chunk
        + (rows - visual) * layer.mlp
        + visual * visual_mlp
    )
