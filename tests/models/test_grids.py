"""Which visual token shows which part of a picture: read off the colours of a picture whose red is
how far right and whose green is how far down, through the families' own processors and models."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import IMAGE, tiny_llava
from tiny_models import ALL, VIDEO
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import vtp_kernels as vtp
from vtp_kernels.models.pictures.grids import picture_grids

NEWLINE = -9.0
PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
CROP = {"crop_size": {"height": 56, "width": 56}}
SHORT = {"size": {"shortest_edge": 56}}
SQUARES = {"size": {"height": 112, "width": 112}, **PLAIN}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
TILES = {"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 56}}
PATCHES = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    **PLAIN,
}


def least_enlarged(size, edges, fewest, most):
    """Columns and rows of tiles in Command-A Vision, as its processor, which needs torchvision,
    tells them."""
    grids = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most]
    grids = np.array(sorted(grids, key=np.prod))
    scales = (grids * edges / np.array(size)[::-1]).min(1)
    if (scales >= 1).any():
        return tuple(grids[np.where(scales < 1, np.inf, scales).argmin()].tolist())
    return tuple(grids[scales.argmax()].tolist())


class CohereTiles(GotOcr2ImageProcessorPil):
    """That of Aya Vision with other numbers of tiles."""

    def preprocess(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(got_ocr2, "get_optimal_tiled_canvas", least_enlarged)
            return super().preprocess(*args, **kwargs)


class Lfm2Tiles:
    """That of LFM2-VL needs torchvision. What it makes, told again: tiles of 16 x 16 pixels line by
    line, and the whole picture; a small picture is whole. Patches are squares of 4 pixels."""

    def __init__(self, whole=True):
        self.whole = whole

    def __call__(self, images, return_row_col_info=False, return_tensors="pt"):
        given = {"pixel_values": [], "spatial_shapes": []}
        given |= {"image_rows": [], "image_cols": [], "tokens": []}
        for image in images[0] if isinstance(images[0], list) else images:
            rows, columns = (round(side / 80) for side in (image.height, image.width))
            if rows * columns < 2:
                rows = columns = 1
            first = len(given["spatial_shapes"])
            given["image_rows"].append(rows)
            given["image_cols"].append(columns)
            if rows * columns > 1:
                large = np.asarray(image.resize((16 * columns, 16 * rows)))
                for row in range(rows):
                    for column in range(columns):
                        tile = large[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                        self.add(given, tile)
            if rows * columns == 1 or self.whole:
                sides = (8 * max(side // 80, 1) for side in image.size)
                self.add(given, np.asarray(image.resize(tuple(sides))))
            given["tokens"].append(sum(h * w // 4 for h, w in given["spatial_shapes"][first:]))
        given["pixel_values"] = torch.stack(given["pixel_values"])
        given["spatial_shapes"] = torch.tensor(given["spatial_shapes"])
        return given if return_row_col_info else dict(list(given.items())[:2])

    @staticmethod
    def add(given, pixels):
        high, wide = pixels.shape[0] // 4, pixels.shape[1] // 4
        patches = pixels.reshape(high, 4, wide, 4, 3).swapaxes(1, 2).reshape(high * wide, 48)
        padded = np.zeros((128, 48), np.float32)
        padded[: len(patches)] = patches / 255
        given["pixel_values"].append(torch.tensor(padded))
        given["spatial_shapes"].append([high, wide])


PROCESSORS = {
    "llava": CLIPImageProcessorPil(**SHORT, **CROP, **PLAIN),
    "llava padded": LlavaImageProcessorPil(**SHORT, **CROP, **PLAIN, do_pad=True),
    "llava squeezed": CLIPImageProcessorPil(size={"height": 56, "width": 56}, **CROP, **PLAIN),
    "llava_next": LlavaNextImageProcessorPil(
        **SHORT, **CROP, **PLAIN, image_grid_pinpoints=PINPOINTS
    ),
    "llava_onevision": LlavaOnevisionImageProcessorPil(
        size={"height": 56, "width": 56},
        **PLAIN,
        image_grid_pinpoints=[*PINPOINTS, [56, 56], [168, 224]],
    ),
    "internvl": GotOcr2ImageProcessorPil(**SQUARES, crop_to_patches=True, max_patches=6),
    "vipllava": CLIPImageProcessorPil(**SHORT, **CROP, **PLAIN),
    "llava_next_video": LlavaNextImageProcessorPil(
        **SHORT, **CROP, **PLAIN, image_grid_pinpoints=PINPOINTS
    ),
    "deepseek_vl": DeepseekVLImageProcessorPil(size={"height": 56, "width": 56}, **PLAIN),
    "janus": JanusImageProcessorPil(size={"height": 56, "width": 56}, **PLAIN),
    "got_ocr2": GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, **PLAIN),
    "got_ocr2 cropped": GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, **PLAIN, crop_to_patches=True, max_patches=6
    ),
    "idefics3": Idefics3ImageProcessorPil(**TILES, **PLAIN),
    "idefics3 whole": Idefics3ImageProcessorPil(**TILES, **PLAIN, do_image_splitting=False),
    "smolvlm": SmolVLMImageProcessorPil(**TILES, **PLAIN),
    "mistral3": PixtralImageProcessorPil(
        size={"longest_edge": 112}, patch_size={"height": 28, "width": 28}, **PLAIN
    ),
    "qwen2_5_vl": Qwen2VLImageProcessorPil(**PATCHES),
    "qwen2_vl": Qwen2VLImageProcessorPil(**PATCHES),
    "qwen3_vl": Qwen2VLImageProcessorPil(**PATCHES),
    "glm4v": Glm4vImageProcessorPil(**PATCHES),
    "paddleocr_vl": PaddleOCRVLImageProcessorPil(**PATCHES),
    "qianfan_ocr": GotOcr2ImageProcessorPil(**SQUARES, crop_to_patches=True, max_patches=6),
    "aya_vision": GotOcr2ImageProcessorPil(**SQUARES, crop_to_patches=True, max_patches=6),
    "aya_vision whole": GotOcr2ImageProcessorPil(**SQUARES),
    "cohere2_vision": CohereTiles(**SQUARES, crop_to_patches=True, max_patches=6),
    "granite4_vision": LlavaNextImageProcessorPil(
        **SHORT, **CROP, **PLAIN, image_grid_pinpoints=PINPOINTS
    ),
    "lfm2_vl": Lfm2Tiles(),
    "lfm2_vl tiles": Lfm2Tiles(whole=False),
}
PROCESSORS = {kind: made for kind, made in PROCESSORS.items() if kind.split()[0] in {*ALL, "llava"}}
if "granite_docling" in ALL:  # in transformers 5.23
    from transformers import GraniteDoclingImageProcessorPil

    PROCESSORS["granite_docling"] = GraniteDoclingImageProcessorPil(
        size={"height": 56, "width": 56}, **PLAIN, max_patches=6
    )
# Pixels to a token's side, where a model puts its tokens in reading order.
EDGES = {"deepseek_vl": 14, "janus": 14, "got_ocr2": 16, "mistral3": 28}
SIZES = ((90, 200), (150, 60), (100, 100), (330, 440))  # height, width


def gradient(height, width, blue=1.0):
    y, x = np.mgrid[:height, :width] + 0.5
    shares = np.stack((x / width, y / height, np.full_like(x, blue)), -1)
    return Image.fromarray(np.round(shares * 255).astype(np.uint8))


class Colours(nn.Module):
    """A vision tower that sees the mean colour of each patch."""

    def __init__(self, tower):
        super().__init__()
        self.config = tower.config
        kind = tower.config.model_type
        self.cls = hasattr(tower.config, "projection_dim") or "internvl" in kind or "ocr" in kind

    def forward(self, pixel_values, **options):
        seen = nn.functional.avg_pool2d(pixel_values, 14).flatten(2).transpose(1, 2).contiguous()
        if self.cls:
            seen = torch.cat((torch.zeros(len(seen), 1, 3), seen), 1)
        return BaseModelOutputWithPooling(last_hidden_state=seen, hidden_states=(seen,) * 8)


class Mean(nn.Module):
    def forward(self, given):
        return given.view(*given.shape[:-1], -1, 3).mean(-2)


def colours(model, family, pictures):
    """[N, 3]: what the model's visual tokens show, in the order of the text's rows."""
    if "image_grid_thw" in pictures:
        patches = pictures["pixel_values"].reshape(len(pictures["pixel_values"]), 3, -1).mean(2)
        if family == "paddleocr_vl":  # merges them behind its tower
            of_each = patches.split(pictures["image_grid_thw"].prod(1).tolist())
            grids = zip(of_each, pictures["image_grid_thw"].tolist(), strict=True)
            squares = [x.view(h // 2, 2, w // 2, 2, 3).transpose(1, 2) for x, (_, h, w) in grids]
            patches = torch.cat([x.reshape(-1, 3) for x in squares])
        return patches.view(-1, 4, 3).mean(1)
    if family in EDGES:
        edge, pixels = EDGES[family], pictures["pixel_values"]
        sizes = pictures.get("image_sizes", [pixels.shape[-2:]] * len(pixels))
        shown = [
            picture[:, :high, :wide] for picture, (high, wide) in zip(pixels, sizes, strict=True)
        ]
        return torch.cat([nn.functional.avg_pool2d(x, edge).flatten(1).T for x in shown])
    base = model.model
    if family in PACKS:
        return PACKS[family](base, **pictures).reshape(-1, 3)
    if hasattr(base, "connector"):
        base.vision_model = Colours(base.vision_model)
        base.connector.modality_projection = Mean()
        return torch.cat(base.get_image_features(**pictures, return_dict=True).pooler_output)
    base.vision_tower = Colours(base.vision_tower)
    base.multi_modal_projector = Mean()
    if hasattr(base, "image_newline"):
        base.image_newline = nn.Parameter(torch.full((3,), NEWLINE))
    rows = base.get_image_features(**pictures, return_dict=True).pooler_output
    return rows.flatten(0, 1) if isinstance(rows, torch.Tensor) else torch.cat(list(rows))


def mean_of_patches(pixels, edge=14):
    """[N, P, 3]"""
    return nn.functional.avg_pool2d(pixels, edge).flatten(2).transpose(1, 2).contiguous()


def shuffled(base, pixel_values):
    return Mean()(base.multi_modal_projector.pixel_shuffle(mean_of_patches(pixel_values)))


def docling(base, pixel_values, pixel_attention_mask):
    path = base.vision_model.connector.coarse
    patches = mean_of_patches(pixel_values[pixel_attention_mask.bool()])
    return Mean()(path.pixel_shuffle(patches, path.scale_factor))


def unshuffled(base, pixel_values, spatial_shapes):
    patches = pixel_values.view(len(pixel_values), -1, 16, 3).mean(2)
    shown = [
        Mean()(base.multi_modal_projector.pixel_unshuffle(x[: h * w].view(1, h, w, 3))).view(-1, 3)
        for x, (h, w) in zip(patches, spatial_shapes.tolist(), strict=True)
    ]
    return torch.cat(shown)


def packed(base, pixel_values, image_sizes):
    """[N, 3], and where pictures are parts of it, as the model splits them."""
    edge = base.config.vision_config.image_size
    sizes, pinpoints = image_sizes.tolist(), base.config.image_grid_pinpoints
    module = sys.modules[type(base).__module__]
    counts = [module.image_size_to_num_patches(size, pinpoints, edge) for size in sizes]
    crops = [mean_of_patches(x[:count], 28) for x, count in zip(pixel_values, counts, strict=True)]
    newline = torch.full((3,), NEWLINE)
    return torch.cat(base.pack_image_features(crops, sizes, "full", newline))


WORDS_BETWEEN = ("aya_vision", "cohere2_vision", "granite_docling", "idefics3", "lfm2_vl")
PACKS = {
    "aya_vision": shuffled,
    "cohere2_vision": shuffled,
    "granite_docling": docling,
    "granite4_vision": packed,
    "lfm2_vl": unshuffled,
}


def model_of(family):
    model = tiny_llava() if family == "llava" else ALL[family].model("sdpa")
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = PROCESSORS[family].image_grid_pinpoints
    return model


def processed(kind, images, nested=False):
    asked = kind.split()[0] in ("idefics3", "smolvlm", "lfm2_vl")
    more = {"return_row_col_info": True} if asked else {}
    pictures = dict(PROCESSORS[kind]([images] if nested else images, return_tensors="pt", **more))
    counts = pictures.pop("num_patches", None)
    if "rows" in pictures:  # of tiles, and the whole picture
        sides = zip(pictures.pop("rows")[0], pictures.pop("cols")[0], strict=True)
        tiles = [int(rows * columns) for rows, columns in sides]
        counts = [n + (n != 1) for n in tiles]
    if "image_rows" in pictures:
        counts = pictures.pop("tokens")
        del pictures["image_rows"], pictures["image_cols"]
    if not nested:
        pictures.pop("batch_num_images", None)
    return pictures, counts


def check_view(view, seen, blue=1.0):
    """Every cell shows the mean colour of its part of the picture, padding being black."""
    rows, columns = view.tokens.shape
    left, top, right, bottom = view.box
    for i in range(rows):
        for j in range(columns):
            x, wide = middle(left + (right - left) * torch.tensor([j, j + 1]) / columns)
            y, high = middle(top + (bottom - top) * torch.tensor([i, i + 1]) / rows)
            expected = torch.stack((x, y, torch.tensor(blue))) * wide * high
            # Processors pad by whole pixels, of which a cell here is 14 high.
            bound = 0.02 if wide * high == 1 else 1 / 14
            torch.testing.assert_close(seen[view.tokens[i, j]], expected, atol=bound, rtol=0)


def middle(ends):
    """Of what lies within the picture: its middle, and its share of the whole stretch."""
    inside = ends.clamp(0, 1)
    return inside.mean(), (inside[1] - inside[0]) / (ends[1] - ends[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", PROCESSORS)
def test_cells_show_their_part_of_the_picture(kind):
    """Four pictures in two prompts, the last of them at the very end."""
    family = kind.split()[0]
    images = [gradient(*size) for size in SIZES]
    pictures, tiles = processed(kind, images)
    model = model_of(family)
    parts = model_of(family)
    seen = colours(model, family, pictures)
    counts = counted(family, pictures, tiles, len(seen))
    ids, ends = prompts_of(counts, family in WORDS_BETWEEN)
    grids = picture_grids(
        parts, {**pictures, "input_ids": ids}, images=images, processor=PROCESSORS[kind]
    )
    assert [picture.prompt for picture in grids] == [0, 0, 1, 1]
    assert [len(picture.columns) for picture in grids] == counts
    for picture, end in zip(grids, ends, strict=True):
        tokens, seen = seen[: len(picture.columns)], seen[len(picture.columns) :]
        assert (ids[picture.prompt, picture.columns] == IMAGE).all()
        assert int(picture.columns[-1]) == end
        used = torch.cat([view.tokens.flatten() for view in picture.views])
        assert len(used.unique()) == len(used)
        newlines = torch.ones(len(tokens), dtype=torch.bool)
        newlines[used] = False
        assert torch.equal(newlines, (tokens == NEWLINE).all(1))
        for view in picture.views:
            check_view(view, tokens)


def counted(family, pictures, tiles, total):
    if family == "lfm2_vl":
        counts = tiles
    elif tiles is not None:
        counts = [total // sum(tiles) * n for n in map(int, tiles)]
    elif "image_grid_thw" in pictures:
        counts = [int(thw.prod()) // 4 for thw in pictures["image_grid_thw"]]
    elif family == "mistral3":
        counts = [int(size.prod()) // 28**2 for size in pictures["image_sizes"]]
    elif "image_sizes" not in pictures:
        counts = [total // 4] * 4
    else:
        model = model_of(family).model
        output = model.get_image_features(**pictures, return_dict=True)
        features = output.pooler_output or output.deepstack_features[0][1]
        counts = [len(part) for part in features]
    assert sum(counts) == total
    return counts


def prompts_of(counts, words_between=False):
    """Two left-padded prompts of two pictures each, and the column of each picture's last token."""
    shown = [[IMAGE] * count for count in counts]
    if words_between:
        shown = [[x for i in range(0, len(y), 4) for x in (9, *y[i : i + 4])] for y in shown]
    rows = [
        [1, 5, *a, 7, *b, *tail]
        for (a, b), tail in zip((shown[:2], shown[2:]), ((3, 4), ()), strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    ends = [width - 4 - len(shown[1]), width - 3, width - 2 - len(shown[3]), width - 1]
    return ids, ends


@torch.no_grad()
def test_pictures_among_others_are_padded_in_onevision():
    images = [gradient(90, 200), gradient(150, 60)]
    pictures, _ = processed("llava_onevision", images, nested=True)
    seen = colours(model_of("llava_onevision"), "llava_onevision", pictures)
    ids = torch.tensor([[1, *[IMAGE] * 17, 5, *[IMAGE] * 17, 6]])
    grids = picture_grids(model_of("llava_onevision"), {**pictures, "input_ids": ids})
    for index, picture in enumerate(grids):
        (view,) = picture.views
        assert view.box[1 - index] < 0 < 1 < view.box[3 - index]
        check_view(view, seen[17 * index : 17 * index + 17])


def video_of(family, frames):
    """What the model is given of a video: its processors make it as those of pictures do, and need
    a package that is not here."""
    if family != "qwen2_5_vl":
        processor = PROCESSORS["llava" if family == "llava_next_video" else "llava squeezed"]
        return {"pixel_values_videos": processor(frames, return_tensors="pt")["pixel_values"][None]}
    pictures = [PROCESSORS[family](frame, return_tensors="pt") for frame in frames]
    patches = [p["pixel_values"].view(-1, 3, 2, 16)[:, :, 0] for p in pictures]
    pairs = [torch.stack(pair, 2) for pair in zip(patches[::2], patches[1::2], strict=True)]
    _, high, wide = pictures[0]["image_grid_thw"][0].tolist()
    return {
        "pixel_values_videos": torch.cat(pairs).flatten(1),
        "video_grid_thw": torch.tensor([[len(pairs), high, wide]]),
    }


FRAMES = {  # their size, and tokens of the video
    "qwen2_5_vl": ((48, 64), 2 * 48),
    "llava_onevision": ((90, 140), 4 * 4 + 1),
    "llava_next_video": ((90, 140), 4 * 4),
    "llava_next_video strided": ((90, 140), 4 * 1),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FRAMES)
def test_cells_show_their_part_of_the_frame(kind):
    """Two videos of four frames, a bluer one each, and a picture before them."""
    family, (size, tokens) = kind.split()[0], FRAMES[kind]
    frames = [gradient(*size, blue=(i + 1) / 4) for i in range(4)]
    video, model, parts = video_of(family, frames), model_of(family), model_of(family)
    for one in (model, parts):
        if "strided" in kind:  # one column and one row are left over
            one.config.spatial_pool_stride = 3
            one.model.vision_resampler.pool = nn.AvgPool2d(3, 3)
    if family == "qwen2_5_vl":
        patches = video["pixel_values_videos"].view(-1, 4, 3, 32)
        seen = patches.mean((1, 3))
    else:
        colours(model, family, processed(family, [gradient(56, 112)])[0])  # takes the towers out
        seen = model.model.get_video_features(**video, return_dict=True).pooler_output[0]
    assert len(seen) == tokens
    picture = processed(family, [gradient(56, 112)])[0]
    (count,) = [len(x) for x in parts.model.get_image_features(**picture).pooler_output]
    ids = torch.tensor([[1, *[IMAGE] * count, 5, *[VIDEO] * tokens, 6, *[VIDEO] * tokens]])
    inputs = {k: torch.cat((v, v)) for k, v in video.items()} | picture | {"input_ids": ids}
    processor = SimpleNamespace(
        image_processor=PROCESSORS[family], video_processor=PROCESSORS["llava"]
    )
    first, *grids = picture_grids(
        parts, inputs, images=[gradient(56, 112)], videos=[frames, frames], processor=processor
    )
    assert first.frames is None and first.columns.tolist() == list(range(1, count + 1))
    together = 2 if family == "qwen2_5_vl" else 1
    assert [(grid.video, list(grid.frames)) for grid in grids] == [
        (video, list(range(i, i + together))) for video in (0, 1) for i in range(0, 4, together)
    ]
    assert (
        torch.cat([grid.columns for grid in grids]).tolist()
        == (ids[0] == VIDEO).nonzero()[:, 0].tolist()
    )
    for index, grid in enumerate(grids[: len(grids) // 2]):
        (view,) = grid.views
        shown = seen[grid.columns - grids[0].columns[0]]
        blue = sum((i + 1) / 4 for i in grid.frames) / together
        check_view(view, shown, blue)
        newlines = int(kind == "llava_onevision" and index == 3)
        assert (shown == NEWLINE).all(1).sum() == newlines
    with pytest.raises(ValueError, match="videos: expected the 2 videos of inputs, got 1"):
        picture_grids(parts, inputs, videos=[frames])
    with pytest.raises(ValueError, match=r"of whole frames|for 1 of 8 frames"):
        picture_grids(parts, inputs | {"input_ids": ids[:, :-1]})


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [name for name, family in ALL.items() if not family.page.resampled]
)
def test_columns_are_those_of_the_report(family):
    """Where pictures do not end a prompt."""
    tiny = ALL[family]
    model = tiny.model("sdpa")
    inputs = tiny.batch(model, ((0,), 4), ((2, 1), 2), ((), 3))
    grids = picture_grids(model, inputs)
    assert [picture.prompt for picture in grids] == [0, 1, 1]
    with vtp.prune(model, vtp.FastV(layer=2, keep=0.5)) as run:
        model(**inputs)
    visual = torch.zeros_like(run.report().kept.visual)
    for picture in grids:
        visual[picture.prompt, picture.columns] = True
    assert torch.equal(visual, run.report().kept.visual)


@pytest.mark.parametrize("family", ["idefics2", "aria"])
def test_tokens_that_have_no_place(family):
    model = ALL[family].model("sdpa")
    inputs = ALL[family].batch(model, ((0,), 4))
    message = f"each visual token of {family} asks the whole picture .* no place in it: there are"
    with pytest.raises(NotImplementedError, match=message):
        picture_grids(model, inputs)


def test_what_is_not_known_is_refused():
    model = model_of("internvl")
    ids = torch.tensor([[1, *[IMAGE] * 48, 5]])
    pixels = torch.zeros(3, 3, 112, 112)
    with pytest.raises(NotImplementedError, match="images: how internvl lays out tiles"):
        picture_grids(model, {"input_ids": ids, "pixel_values": pixels})
    with pytest.raises(ValueError, match="images: expected the 1 pictures of inputs, got 2"):
        picture_grids(
            model, {"input_ids": ids, "pixel_values": pixels}, images=[gradient(9, 20)] * 2
        )
    with pytest.raises(ValueError, match="input_ids: 47 visual tokens follow upon each other"):
        picture_grids(model, {"input_ids": ids[:, 2:], "pixel_values": pixels})
    for family, given in (
        ("aya_vision", {"pixel_values": pixels}),
        ("lfm2_vl", Lfm2Tiles()([gradient(90, 200)])),
    ):
        model = ALL[family].model("sdpa")
        tokens = 48 if family == "aya_vision" else int(given["spatial_shapes"].prod(1).sum()) // 4
        given = {**given, "input_ids": torch.tensor([[1, *[IMAGE] * tokens, 5]])}
        with pytest.raises(NotImplementedError, match=f"images, processor: how {family} cuts a"):
            picture_grids(model, given, images=[gradient(90, 200)])
    with pytest.raises(ValueError, match="makes 4 tiles of them, and 0 or 2 pict"):
        picture_grids(model, given, images=[gradient(90, 200)] * 2, processor=Lfm2Tiles())
    llava = tiny_llava()
    with pytest.raises(ValueError, match="the 48 visual tokens of prompt 0 are not those of whole"):
        picture_grids(llava, {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 56, 56)})
    with pytest.raises(ValueError, match="no visual tokens for 1 of 4 pictures"):
        picture_grids(llava, {"input_ids": ids, "pixel_values": torch.zeros(4, 3, 56, 56)})
    assert picture_grids(llava, {"input_ids": torch.tensor([[1, 5, 6]])}) == []
