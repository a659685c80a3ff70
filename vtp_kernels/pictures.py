"""Picture files: read as vision towers expect them, upright RGB; frames of videos; and where one
can be written."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["check_writable", "load_frames", "load_image"]

#: Modes of grey pictures with more than 8 bits a pixel.
_DEEP = ("I", "F")
#: What the libraries below PIL raise for files that are cut or broken.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def load_image(image) -> Image.Image:
    """An upright RGB picture.

    It is turned the way its EXIF orientation says. What is transparent is put on white. Grey of 16
    bits is scaled from 0 to 65535. Grey of 32 bits, int or float, is scaled from the least of these
    ranges that holds all its pixels: 0 to 1 (float), 0 to 255, 0 to 65535, else from its minimum to
    its maximum. Of several frames the first is taken.

    Args:
        image: a path or a `PIL.Image.Image`, which is left as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a picture, is cut, has more pixels than PIL takes for safe,
            or pixels that are no finite numbers.
        TypeError: `image` is neither a path nor a picture.
    """
    if isinstance(image, Image.Image):
        return _read(image, "the given picture")
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"image: expected a path or a PIL image, got {type(image).__name__}")
    name = repr(os.fspath(image))
    try:
        opened = Image.open(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"image: no such file: {name}") from None
    except _BROKEN as error:
        raise ValueError(_cannot_be_read(name, error)) from error
    with opened:
        return _read(opened, name)


def load_frames(video: str | os.PathLike, most: int | None = None) -> list[Image.Image]:
    """The frames of a video, each as `load_image` reads a picture.

    Args:
        video: a folder of pictures, in the order of the numbers in their names; or a picture that
            moves: GIF, WebP or PNG. Other videos are for a program that writes their frames into a
            folder: nothing here decodes them.
        most: of more frames than that, so many are taken, evenly over the video.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it has fewer than two frames, or cannot be read.
    """
    path = Path(video)
    if path.is_dir():
        files = sorted((x for x in path.iterdir() if _is_picture(x)), key=_number_in_name)
        _check_several(len(files), path)
        return [load_image(file) for file in _evenly(files, most)]
    try:
        opened = Image.open(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"video: no such file or folder: {str(path)!r}") from None
    except _BROKEN as error:
        raise ValueError(
            f"video: {str(path)!r} is no moving picture that can be read here (GIF, WebP, PNG); "
            "write its frames into a folder, and give that: ffmpeg -i VIDEO FOLDER/%04d.png"
        ) from error
    with opened:
        count = getattr(opened, "n_frames", 1)
        _check_several(count, path)
        frames = []
        for index in _evenly(range(count), most):
            try:
                opened.seek(index)
                frames.append(_read(opened.copy(), f"frame {index} of {str(path)!r}"))
            except _BROKEN as error:
                raise ValueError(f"video: frame {index} of {str(path)!r}: {error}") from error
        return frames


def _is_picture(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def _number_in_name(path: Path) -> list[tuple[int, int | str]]:
    """frame2 comes before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _check_several(count: int, path: Path) -> None:
    if count < 2:
        raise ValueError(f"video: expected frames, {str(path)!r} has {count}; one is a picture")


def _evenly(frames, most: int | None) -> list:
    if most is None or len(frames) <= most:
        return list(frames)
    return [frames[int((i + 0.5) * len(frames) / most)] for i in range(most)]


def check_writable(path: str | os.PathLike, what: str = "out") -> None:
    """Raise, naming `what`, if no picture can be written to `path`; nothing there is changed.

    Raises:
        OSError: the folder is not there, or the file cannot be opened for writing.
        ValueError: PIL writes no pictures with that suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(
            f"{what}: expected a name that ends as pictures do, .png say, got {str(path)!r}"
        )
    check_file(path, what)


def check_file(path: str | os.PathLike, what: str) -> None:
    """Raise OSError, naming `what`, if no file can be written to `path`: the folder is not there,
    or it cannot be opened for writing. Nothing there is changed."""
    path = Path(path)
    there = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise OSError(f"{what}: cannot write {str(path)!r}: {error.strerror}") from error
    if not there:
        path.unlink()


def _read(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _rgb(_upright(image))
    except _BROKEN as error:
        raise ValueError(_cannot_be_read(name, error)) from error


def _cannot_be_read(name: str, error: Exception) -> str:
    return f"image: {name} cannot be read as a picture: {error}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:  # a broken EXIF block says nothing; the picture itself has been read
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some of its pixels are no finite numbers")
    low, high = _range_of(image.mode, values)
    shades = np.round((values - low) * (255 / ((high - low) or 1)))
    return Image.fromarray(shades.astype(np.uint8))


def _range_of(mode: str, values: np.ndarray) -> tuple[float, float]:
    """What is black and what is white."""
    if mode.startswith("I;16"):
        return 0, 65535
    low, high = float(values.min()), float(values.max())
    ranges = (1, 255, 65535) if mode == "F" else (255, 65535)
    if low >= 0 and high <= ranges[-1]:
        return 0, next(white for white in ranges if high <= white)
    return low, high
