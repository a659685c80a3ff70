"""`demo.compare` and its drawing, in every family and with pictures of any shape."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import tiny_llava
from tiny_models import ALL, FAMILIES
from tiny_processors import CUT, PROCESSORS
from transformers import LlamaForCausalLM

import vtp_kernels as vtp
from vtp_kernels import demo
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.plot.sheet import CAPTION, GAP
from vtp_kernels.plot.tokens import FRAME, PANEL

SCHEDULE = {"half": vtp.Schedule({3: 0.5, 5: 0})}
LINES = {"llava": 1, "qwen2_5_vl": 1}  # rows of panels for a picture; else the crops have one, too


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(160, 255, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def model_of(family):
    return tiny_llava() if family == "llava" else FAMILIES[family].model("sdpa")


def dimmed(drawn, column, lines, width, height):
    """Of the pictures in a column of panels, the share that is dimmed; what is white is not seen
    by the model."""
    shades, left, each = np.asarray(drawn.convert("L")), column * (PANEL + GAP), []
    for line in range(lines):
        top = line * (height + CAPTION + GAP) + CAPTION
        panel = shades[top : top + height, left : left + width]
        each.append((panel < 80).sum() / (panel < 255).sum())
    return each


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("size", [(80, 80), (180, 90), (60, 140)], ids=["square", "wide", "tall"])
def test_one_picture(family, size, tmp_path):
    out = tmp_path / "kept.png"
    comparison = demo.compare(
        model_of(family),
        PROCESSORS[family](),
        picture(*size),
        ["w5 w6", "w7"],
        SCHEDULE,
        max_new_tokens=2,
        repeats=1,
        picture=out,
    )
    assert comparison.picture == str(out) and comparison.not_drawn is None
    drawn = Image.open(out)
    width, height = (round(PANEL * side / max(size)) for side in size)
    lines = LINES.get(family, 2)
    if family == "internvl" and size == (80, 80):
        lines = 1  # one tile
    assert drawn.size == (
        3 * (PANEL + GAP) - GAP,
        lines * (height + CAPTION + GAP),
    )
    half, none = (dimmed(drawn, column, lines, width, height) for column in (1, 2))
    assert max(dimmed(drawn, 0, lines, width, height)) == 0
    assert 0.05 < np.mean(half) < 0.95 and min(none) > 0.99


@pytest.mark.parametrize("family", PROCESSORS)
def test_two_pictures_and_a_batch(family, tmp_path):
    comparison = demo.compare(
        model_of(family),
        PROCESSORS[family](),
        [picture(180, 90), picture(90, 100, 1)],
        ["w5 w6", "w7"],
        SCHEDULE,
        max_new_tokens=2,
        repeats=1,
        picture=tmp_path / "kept.png",
    )
    assert len(comparison.rows[1].answers) == 2
    # In OneVision pictures among others are not cut; in a square one, InternVL has one tile.
    heights = {"llava": (112, 224), "qwen2_5_vl": (112, 224), "llava_onevision": (112, 224)}
    heights |= {"internvl": (112, 112, 224), "llava_next": (112, 112, 224, 224)}
    expected = sum(height + CAPTION + GAP for height in heights[family])
    assert Image.open(tmp_path / "kept.png").height == expected


@pytest.mark.parametrize("family", CUT)
def test_tiles_with_words_between_them(family, tmp_path):
    """Two pictures, the first in tiles; and a video of frames in slices."""
    model, processor = ALL[family].model("eager"), CUT[family]()
    schedule = {"half": vtp.Schedule({2: 0.5, 4: 0}, score="random")}
    videos = [[picture(90, 60, seed) for seed in range(3)]] if "minicpm" in family else []
    out, page = tmp_path / "kept.png", tmp_path / "kept.html"
    comparison = demo.compare(
        model,
        processor,
        [picture(180, 90), picture(60, 60, 1)],
        ["w5 w6"],
        schedule,
        videos=videos,
        frames_a_second=2.0,
        max_new_tokens=2,
        repeats=1,
        picture=out,
        page=page,
    )
    assert comparison.not_drawn is None and "crops" in page.read_text()
    panels = (112, 112, 224)  # the first whole and in tiles; the second is not cut
    expected = sum(height + CAPTION + GAP for height in panels)
    sheet = CAPTION + round(FRAME * 60 / 90) + CAPTION + GAP
    assert Image.open(out).height == expected + 2 * sheet * len(videos)  # two layers


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "internvl"])
def test_a_video_behind_a_picture(family, tmp_path):
    """Frames of InternVL come as pictures, and are drawn as frames all the same."""
    frames = [picture(90, 60, seed) for seed in range(10)]
    given = (model_of(family), PROCESSORS[family](), [picture(90, 60)], ["w5 w6", "w7"])
    out = tmp_path / "kept.png"
    more = {"videos": [frames], "frames_a_second": 2.0}
    comparison = demo.compare(*given, SCHEDULE, max_new_tokens=2, repeats=1, picture=out, **more)
    assert comparison.not_drawn is None and len(comparison.rows[1].answers) == 2
    high = round(FRAME * 60 / 90) + CAPTION
    rows = 1 if family == "qwen2_5_vl" else 2  # two frames to a grid
    sheet = CAPTION + rows * high + GAP
    panels = round(PANEL * 60 / 90) + CAPTION + GAP
    lines = 2 if family == "internvl" else 1  # crops, of a prompt's only picture and of each
    lines = 2 if family == "llava_onevision" else lines
    assert Image.open(out).height == lines * panels + 2 * sheet  # two layers
    alone = demo.compare(given[0], given[1], [], ["w5"], {}, repeats=1, **more)
    assert len(alone.rows) == 1


def test_a_layout_that_is_not_known_leaves_the_answers(tmp_path, monkeypatch):
    """It is found out before an answer is computed; the picture is left out."""

    def unknown(given):
        raise NotImplementedError("what it shows is not known")

    monkeypatch.setattr(PAGES["llava"], "looks", unknown)
    given = (tiny_llava(), PROCESSORS["llava"](), picture(80, 80), ["w5"], SCHEDULE)
    out = tmp_path / "kept.png"
    comparison = demo.compare(*given, max_new_tokens=2, repeats=1, picture=out)
    assert comparison.rows[1].answers and not out.exists()
    assert comparison.picture is None and comparison.not_drawn == "what it shows is not known"


def test_what_cannot_be_is_refused_before_any_answer(tmp_path, monkeypatch):
    model, processor = tiny_llava(), PROCESSORS["llava"]()
    monkeypatch.setattr(demo, "greedy_answers", lambda *given: pytest.fail("an answer"))
    for change, kind, message in (
        ({"methods": {"late": vtp.FastV(layer=77)}}, ValueError, "there is no layer 77"),
        ({"image": []}, ValueError, "image: expected at least one picture or video"),
        ({"videos": [[picture(8, 8)] * 2]}, ValueError, "videos: a LlavaProcessor takes none"),
        ({"picture": tmp_path / "no" / "kept.png"}, OSError, "picture: cannot write"),
    ):
        given = {"image": picture(80, 80), "methods": SCHEDULE} | change
        with pytest.raises(kind, match=message):
            demo.compare(model, processor, prompts=["w5"], **given)
    text = LlamaForCausalLM(model.config.text_config)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is not supported"):
        demo.compare(text, processor, picture(80, 80), ["w5"], {})
    with torch.no_grad():  # and no method is left in the model
        vtp.apply(model, vtp.FastV(layer=2)).remove()
