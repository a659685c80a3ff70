"""What the tokens of videos show whose frames are squares, made smaller by pooling."""

from __future__ import annotations

from collections.abc import Callable

from .looks import WHOLE, Box, Given, Looks, Size, View, cells

__all__ = ["pooled_frames"]


def pooled_frames(
    given: Given,
    side: int,
    box: Callable[[Size], Box] = lambda size: WHOLE,
    first: int = 0,
    newlines: int = 0,
) -> list[Looks]:
    """side: tokens in a row of a frame. box: where they lie. first, newlines: tokens before those
    of each frame, as CLS, and behind the last frame, that show nothing."""
    shape, features = given.told("video")
    tokens = first + side * side
    if shape is not None:
        counts = [shape[1]] * shape[0]
    else:
        counts = [(length - newlines) // tokens for length in features]
    looks = []
    for video, count in enumerate(counts):
        place = box(given.frame_size_of(video))
        views = (View("whole", first + cells(side, side), place),)
        for frame in range(count):
            more = newlines if frame == count - 1 else 0
            looks.append(Looks(tokens + more, views, video, range(frame, frame + 1)))
    return looks
