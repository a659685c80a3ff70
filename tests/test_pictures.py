"""Picture files of every kind come out as upright RGB; files that are none, as one clear line."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from vtp_kernels.pictures import check_writable, load_frames, load_image

HALVES = Image.new("RGB", (40, 20), "red")
HALVES.paste("blue", (20, 0, 40, 20))  # red on the left, blue on the right


def pixels(image):
    return np.asarray(load_image(image))


# What a camera writes for each orientation: how the upright picture lies in the file.
TURNED = {
    1: HALVES,
    2: HALVES.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: HALVES.transpose(Image.Transpose.ROTATE_180),
    6: HALVES.transpose(Image.Transpose.ROTATE_90),
    8: HALVES.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_a_photo_is_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    TURNED[orientation].save(tmp_path / "photo.png", exif=exif)
    opened = Image.open(tmp_path / "photo.png")
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), opened):
        assert np.array_equal(pixels(image), np.asarray(HALVES))
    assert np.array_equal(pixels(load_image(opened)), np.asarray(HALVES))  # once is enough


def test_a_broken_exif_block_says_nothing(tmp_path):
    HALVES.save(tmp_path / "photo.jpg", exif=b"Exif\0\0nonsense", quality=100)
    assert pixels(tmp_path / "photo.jpg").shape == (20, 40, 3)


RAMP = np.linspace(0, 1, 256)[None].repeat(2, 0)
EXPECTED = np.round(RAMP * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        np.round(RAMP * 65535).astype(np.uint16),
        np.round(RAMP * 65535).astype(np.int32),
        np.round(RAMP * 255).astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 65535).astype(np.float32),
        (RAMP * 3 - 1).astype(np.float32),
        np.round(RAMP * 1e6 - 500).astype(np.int32),
    ],
    ids=["16 bit", "int to 65535", "int to 255", "to 1", "to 255", "to 65535", "-1 to 2", "others"],
)
def test_grey_of_many_bits_is_scaled(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "grey.tiff")
    for image in (tmp_path / "grey.tiff", Image.fromarray(values)):
        found = pixels(image)
        assert found.shape == (2, 256, 3) and (found == found[..., :1]).all()
        assert abs(found[..., 0].astype(int) - EXPECTED).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 514, np.uint16)).save(tmp_path / "dark.png")
    assert (pixels(tmp_path / "dark.png") == 2).all()
    assert (pixels(Image.fromarray(np.zeros((4, 4), np.float32))) == 0).all()


def test_16_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "grey.png", exif=exif)
    assert pixels(tmp_path / "grey.png")[0, :, 0].tolist() == [255, 0]


def half_seen(mode):
    """Black, the left half transparent."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    return image.convert(mode)


def keyed(mode, colour, seen):
    """A PNG in which one colour stands for transparent."""
    image = Image.new(mode, (4, 2), seen)
    image.paste(colour, (0, 0, 2, 2))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=colour)
    return Image.open(file)


@pytest.mark.parametrize(
    "image",
    [
        half_seen("RGBA"),
        half_seen("LA"),
        half_seen("RGBa"),
        keyed("L", 7, 0),
        keyed("RGB", (7, 7, 7), (0, 0, 0)),
    ],
    ids=["RGBA", "LA", "RGBa", "L", "RGB"],
)
def test_what_is_transparent_is_white(image):
    found = pixels(image)
    assert (found[:, :2] == 255).all() and (found[:, 2:] == 0).all()


def test_palettes_with_transparency(tmp_path):
    half_seen("RGBA").quantize(4).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    found = pixels(tmp_path / "palette.png")
    assert (found[:, :2] == 255).all() and (found[:, 2:] == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_other_modes_look_the_same(mode):
    white = Image.new("RGB", (3, 2), "white").convert(mode)
    assert (pixels(white) == 255).all()


def one_line(error, *words):
    message = str(error.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words)


def test_files_that_are_no_pictures(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        load_image(tmp_path / "none.png")
    one_line(error, "image: no such file", "none.png")
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.tiff", "cut.webp"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, Image.registered_extensions()[name[3:]])
        (tmp_path / name).write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    for name in ("text.png", "cut.png", "cut.jpg", "cut.tiff", "cut.webp", "."):
        with pytest.raises(ValueError) as error:
            load_image(tmp_path / name)
        one_line(error, "image: ", "cannot be read as a picture", str(tmp_path))
    HALVES.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ValueError) as error:
        load_image(tmp_path / "bomb.png")
    one_line(error, "bomb.png", "decompression bomb")


def test_pixels_that_are_no_numbers():
    with pytest.raises(ValueError) as error:
        load_image(Image.fromarray(np.array([[0.0, np.nan]], np.float32)))
    one_line(error, "image: the given picture", "no finite numbers")


def test_where_a_picture_can_be_written(tmp_path):
    check_writable(tmp_path / "new.png")
    assert not (tmp_path / "new.png").exists()
    (tmp_path / "old.png").write_text("here before")
    check_writable(str(tmp_path / "old.png"))
    assert (tmp_path / "old.png").read_text() == "here before"
    (tmp_path / "folder.png").mkdir()
    for path, kind, words in (
        (tmp_path / "none" / "a.png", OSError, "No such file or directory"),
        (tmp_path / "folder.png", OSError, "Is a directory"),
        (tmp_path / ("a" * 300 + ".png"), OSError, "File name too long"),
        (tmp_path / "kept", ValueError, "a name that ends as pictures do"),
        (tmp_path / "kept.txt", ValueError, "a name that ends as pictures do"),
    ):
        with pytest.raises(kind) as error:
            check_writable(path, "--out")
        one_line(error, "--out: ", words, os.fspath(path))


# --- frames of videos ---------------------------------------------------------------------------


def shades(frames):
    return [frame.getpixel((0, 0))[0] for frame in frames]


GREYS = [Image.new("L", (8, 8), 20 * i) for i in range(12)]


def test_frames_of_a_folder_come_by_their_numbers(tmp_path):
    for index, frame in enumerate(GREYS):
        frame.save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames = load_frames(tmp_path)
    assert shades(frames) == [20 * i for i in range(12)]
    assert all(frame.mode == "RGB" for frame in frames)
    assert shades(load_frames(tmp_path, most=4)) == [20, 80, 140, 200]
    assert len(load_frames(tmp_path, most=12)) == len(load_frames(tmp_path, most=99)) == 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_frames_of_a_picture_that_moves(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    GREYS[0].save(path, save_all=True, append_images=GREYS[1:], **lossless)
    assert shades(load_frames(path)) == [20 * i for i in range(12)]
    assert shades(load_frames(str(path), most=3)) == [40, 120, 200]


def test_what_is_no_video_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="video: no such file or folder"):
        load_frames(tmp_path / "none.gif")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42 and so on")
    with pytest.raises(
        ValueError, match=r"film.mp4' is no moving picture .* write its frames into"
    ):
        load_frames(tmp_path / "film.mp4")
    GREYS[0].save(tmp_path / "still.png")
    with pytest.raises(ValueError, match=r"expected frames, .*still.png' has 1; one is a picture"):
        load_frames(tmp_path / "still.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected frames, .*empty' has 0"):
        load_frames(tmp_path / "empty")
