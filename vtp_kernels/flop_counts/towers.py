"""Vision towers: what one picture takes, a line in TOWERS for each type of model.

All layers of a tower run, whichever the features are taken from. A video of Qwen or GLM is counted
as pictures, one for each `temporal_patch_size` frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["TOWERS", "Features", "Size", "features"]

Size = tuple[int, int] | None
"""Height and width in pixels, as the tower gets them. None: what its configuration says."""


class Features(NamedTuple):
    """What a tower makes of a picture, and the multiply-accumulates it takes: `rows` x `columns` of
    them with so many channels, and `others` besides (CLS)."""

    macs: int
    rows: int
    columns: int
    channels: int
    others: int = 0


def features(vision: Any, kind: str, size: Size) -> Features:
    """`kind` is the type of the vision configuration; NotImplementedError where it is not known."""
    if kind not in TOWERS:
        raise NotImplementedError(
            f"images: FLOPs of a {kind!r} vision tower are not known; count it elsewhere and pass "
            "images=0"
        )
    return TOWERS[kind](vision, size)


# ---- pictures -------------------------------------------------------------------------------


def _pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _one_size(vision: Any, size: Size) -> tuple[int, int]:
    """Rows and columns of patches in a tower that sees pictures of one size."""
    height, width = _pair(vision.image_size)
    if size is not None and tuple(size) != (height, width):
        raise ValueError(
            f"images: a {vision.model_type!r} tower sees pictures, crops and tiles of {height} x "
            f"{width} pixels, got {size[0]} x {size[1]}"
        )
    return _patches(vision, height, width)


def _any_size(vision: Any, size: Size, merged: int) -> tuple[int, int]:
    """The same where they come in all sizes, and `merged` patches a side become a token."""
    if size is None:
        raise NotImplementedError(
            f"images: pictures come in all sizes to a {vision.model_type!r} tower, and FLOPs go by "
            "them; pass [(height, width), ...] in pixels, as the tower gets them, or images=0"
        )
    for pixels, patch in zip(size, _pair(vision.patch_size), strict=True):
        if pixels < 1 or pixels % (patch * merged):
            raise ValueError(
                f"images: a {vision.model_type!r} tower takes sides that are multiples of "
                f"{patch * merged} pixels, got {size[0]} x {size[1]}"
            )
    return _patches(vision, *size)


def _patches(vision: Any, height: int, width: int) -> tuple[int, int]:
    tall, broad = _pair(vision.patch_size)
    return height // tall, width // broad


def _embedding(vision: Any, patches: int, width: int) -> int:
    """A convolution of patches that do not overlap; of Qwen's, over frames that come together."""
    tall, broad = _pair(vision.patch_size)
    channels = getattr(vision, "in_channels", None) or vision.num_channels
    frames = getattr(vision, "temporal_patch_size", 1)
    return patches * width * channels * tall * broad * _pair(frames)[0]


def _layer(
    rows: int, width: int, mlp: int, pairs: int | None = None, keys: int | None = None
) -> int:
    """`mlp`: of a row; `pairs` of rows that see each other, or all; `keys`: their width, where that
    is less."""
    pairs = rows * rows if pairs is None else pairs
    keys = width if keys is None else keys
    return 2 * rows * width * (width + keys) + 2 * pairs * width + rows * mlp


# ---- towers ---------------------------------------------------------------------------------


def _clip(vision: Any, size: Size) -> Features:
    return _plain(vision, size, others=1)


def _siglip(vision: Any, size: Size) -> Features:
    """Some have a head in which one query attends to all patches; it runs, though nobody asks."""
    return _with_head(vision, _plain(vision, size))


def _siglip2(vision: Any, size: Size) -> Features:
    """The same of pictures in all sizes, without what fills them up to the largest."""
    return _with_head(vision, _of_patches(vision, _any_size(vision, size, 1)))


def _with_head(vision: Any, found: Features) -> Features:
    if not getattr(vision, "vision_use_head", True):
        return found
    width, rows = vision.hidden_size, found.rows * found.columns
    head = 2 * (rows + 1) * width**2 + 2 * rows * width + 2 * width * vision.intermediate_size
    return found._replace(macs=found.macs + head)


def _idefics(vision: Any, size: Size) -> Features:
    """Of tiles in one size; and of pictures in their own, where these come whole (Aria, Idefics
    2)."""
    return _of_patches(vision, _any_size(vision, size or _pair(vision.image_size), 1))


def _plain(vision: Any, size: Size, others: int = 0) -> Features:
    return _of_patches(vision, _one_size(vision, size), others)


def _of_patches(vision: Any, patches: tuple[int, int], others: int = 0) -> Features:
    rows, columns = patches
    width, total = vision.hidden_size, rows * columns
    layer = _layer(total + others, width, 2 * width * vision.intermediate_size)
    macs = _embedding(vision, total, width) + vision.num_hidden_layers * layer
    return Features(macs, rows, columns, width, others)


def _ovis2(vision: Any, size: Size) -> Features:
    """A gated MLP in each layer, and a head that says which visual words squares of patches are."""
    rows, columns = _one_size(vision, size)
    width, patches, stride = vision.hidden_size, rows * columns, vision.hidden_stride
    layer = _layer(patches, width, 3 * width * vision.intermediate_size)
    rows, columns = rows // stride, columns // stride
    words = vision.vocab_size - vision.num_visual_indicator_tokens
    head = rows * columns * stride**2 * width * words
    macs = _embedding(vision, patches, width) + vision.num_hidden_layers * layer + head
    return Features(macs, rows, columns, vision.vocab_size)


def _pixtral(vision: Any, size: Size) -> Features:
    """Pictures of one call do not see each other: each is counted alone, without what fills it up
    to the largest."""
    rows, columns = _any_size(vision, size, 1)
    width, patches = vision.hidden_size, rows * columns
    layer = _layer(patches, width, 3 * width * vision.intermediate_size)
    macs = _embedding(vision, patches, width) + vision.num_hidden_layers * layer
    return Features(macs, rows, columns, width)


def _siglip_of_any_size(vision: Any, size: Size) -> Features:
    merged = getattr(vision, "spatial_merge_size", 1)
    return _of_patches(vision, _any_size(vision, size, merged))


def _minicpm(vision: Any, size: Size) -> Features:
    """Between two layers squares of patches become a row: they attend to each other, and an MLP
    merges them."""
    side = vision.window_kernel_size[0]
    rows, columns = _any_size(vision, size, 2 * side)
    width, patches, square = vision.hidden_size, rows * columns, side**2
    fewer, before = patches // square, vision.insert_layer_id + 1
    mlp = 2 * width * vision.intermediate_size
    macs = _embedding(vision, patches, width) + before * _layer(patches, width, mlp)
    macs += _layer(patches, width, 0, pairs=patches * square)
    macs += fewer * vision.window_intermediate_size * (vision.window_hidden_size + width)
    macs += (vision.num_hidden_layers - before) * _layer(fewer, width, mlp)
    return Features(macs, rows // side, columns // side, width)


def _qwen2(vision: Any, size: Size) -> Features:
    width = vision.embed_dim
    mlp = 2 * width * int(width * vision.mlp_ratio)
    return _merged(vision, size, width, [(mlp, None)] * vision.depth, vision.hidden_size)


def _qwen2_5(vision: Any, size: Size) -> Features:
    """All layers but some go over windows."""
    width, merge = vision.hidden_size, vision.spatial_merge_size
    rows, columns = _any_size(vision, size, merge)
    side = vision.window_size // merge // vision.patch_size * merge  # in patches
    pairs = _in_windows(rows, side) * _in_windows(columns, side)
    mlp = 3 * width * vision.intermediate_size
    layers = [
        (mlp, None if layer in vision.fullatt_block_indexes else pairs)
        for layer in range(vision.depth)
    ]
    head_dim = width // vision.num_heads
    keys = getattr(vision, "num_key_value_heads", vision.num_heads) * head_dim
    return _merged(vision, size, width, layers, vision.out_hidden_size, keys=keys)


def _in_windows(length: int, side: int) -> int:
    """Pairs along one axis that share a window."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


def _qwen3(vision: Any, size: Size) -> Features:
    width = vision.hidden_size
    layers = [(2 * width * vision.intermediate_size, None)] * vision.depth
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return _merged(vision, size, width, layers, vision.out_hidden_size, mergers)


def _merged(
    vision: Any,
    size: Size,
    width: int,
    layers: list[tuple[int, int | None]],
    out: int,
    mergers: int = 1,
    keys: int | None = None,
) -> Features:
    """A tower with layers of (mlp, pairs), and an MLP that makes one token of a square of patches;
    with several, the others' tokens go to layers of the decoder."""
    merge = vision.spatial_merge_size
    rows, columns = _any_size(vision, size, merge)
    patches, square = rows * columns, width * merge**2
    merger = patches // merge**2 * square * (square + out)
    macs = _embedding(vision, patches, width) + mergers * merger
    macs += sum(_layer(patches, width, mlp, pairs, keys) for mlp, pairs in layers)
    return Features(macs, rows // merge, columns // merge, out)


def _ernie(vision: Any, size: Size) -> Features:
    """Squares are merged behind it."""
    width, merge = vision.hidden_size, vision.spatial_merge_size
    rows, columns = _any_size(vision, size, merge)
    patches = rows * columns
    layer = _layer(patches, width, 2 * width * vision.intermediate_size)
    macs = _embedding(vision, patches, width) + vision.depth * layer
    return Features(macs, rows // merge, columns // merge, width)


def _glm4v(vision: Any, size: Size) -> Features:
    return _convolved(vision, size, vision.out_hidden_size, vision.intermediate_size)


def _glm_ocr(vision: Any, size: Size) -> Features:
    merger = vision.out_hidden_size * vision.in_channels
    return _convolved(vision, size, vision.intermediate_size, merger)


def _convolved(vision: Any, size: Size, inner: int, merger_inner: int) -> Features:
    """A convolution merges squares of patches, and a projection and a gated MLP follow. The inner
    widths are of the MLPs in layers, and of the last one."""
    width, out, merge = vision.hidden_size, vision.out_hidden_size, vision.spatial_merge_size
    rows, columns = _any_size(vision, size, merge)
    patches, tokens = rows * columns, rows * columns // merge**2
    merger = tokens * out * (width * merge**2 + out + 3 * merger_inner)
    macs = _embedding(vision, patches, width) + merger
    macs += vision.depth * _layer(patches, width, 3 * width * inner)
    return Features(macs, rows // merge, columns // merge, out)


def _sam(vision: Any, size: Size) -> Features:
    """Segment Anything's: windows, padded to be full, in all layers but some; positions of a row's
    place to others' rows and columns are products, too."""
    rows, columns = _one_size(vision, size)
    width, patches, out = vision.hidden_size, rows * columns, vision.output_channels
    macs = _embedding(vision, patches, width)
    for layer in range(vision.num_hidden_layers):
        tall, broad = rows, columns
        if layer not in vision.global_attn_indexes:
            tall = broad = vision.window_size
        inside = -(-rows // tall) * tall * -(-columns // broad) * broad
        places = tall + broad if vision.use_rel_pos else 0
        macs += inside * width * (4 * width + 2 * tall * broad + places)
        macs += 2 * patches * width * vision.mlp_dim
    macs += patches * out * (width + 9 * out)
    return Features(macs, rows, columns, out)


TOWERS: dict[str, Callable[[Any, Size], Features]] = {
    "clip_vision_model": _clip,
    "cosmos3_edge_vision": _siglip_of_any_size,
    "ernie4_5_vl_moe_vision": _ernie,
    "exaone4_5_vision": _qwen2_5,
    "glm4v_moe_vision": _glm4v,
    "glm4v_vision": _glm4v,
    "glm_ocr_vision": _glm_ocr,
    "got_ocr2_vision": _sam,
    "granite_docling_vision": _plain,
    "idefics2_vision": _idefics,
    "idefics3_vision": _idefics,
    "internvl_vision": _clip,
    "janus_vision_model": _plain,
    "minicpm_ocr_vision": _minicpm,
    "minicpmv4_6_vision": _minicpm,
    "minicpmv4_7_vision": _minicpm,
    "ovis2_vision": _ovis2,
    "paddleocr_vl_vision": _siglip_of_any_size,
    "pixtral": _pixtral,
    "qianfan_ocr_vision": _clip,
    "qwen2_5_omni_vision_encoder": _qwen2_5,
    "qwen2_5_vl": _qwen2_5,
    "qwen2_5_vl_vision": _qwen2_5,
    "qwen2_vl": _qwen2,
    "qwen2_vl_vision": _qwen2,
    "qwen3_5_moe_vision": _qwen3,
    "qwen3_5_vision": _qwen3,
    "qwen3_omni_moe_vision_encoder": _qwen3,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_vl_moe_vision": _qwen3,
    "qwen3_vl_vision": _qwen3,
    "sam_vision_model": _sam,
    "siglip2_vision_model": _siglip2,
    "siglip_vision_model": _siglip,
    "smolvlm_vision": _plain,
    "video_llama_3_vision": _siglip_of_any_size,
}
"""{model_type: what a tower with that configuration makes of a picture of that size}; several have
had two names."""
