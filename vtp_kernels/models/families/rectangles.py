"""What the tokens of pictures that keep their shape show (Pixtral)."""

from __future__ import annotations

from ..looks import Given, Looks, View, cells, one_size

__all__ = ["rectangles"]


def rectangles(given: Given, merge: int = 1) -> list[Looks]:
    """A token shows `merge` x `merge` patches, in reading order."""
    edge = one_size(given.base.config.vision_config.patch_size) * merge
    looks = []
    for height, width in given.grid("image_sizes"):
        rows, columns = height // edge, width // edge
        looks.append(Looks(rows * columns, (View("whole", cells(rows, columns)),)))
    return looks
