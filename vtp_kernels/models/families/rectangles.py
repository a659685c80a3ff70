"""What the tokens of pictures that keep their shape show (Pixtral)."""

from __future__ import annotations

from .looks import Given, Looks, one_size, whole

__all__ = ["rectangles"]


def rectangles(given: Given, merge: int = 1) -> list[Looks]:
    """A token shows `merge` x `merge` patches, in reading order."""
    edge = one_size(given.base.config.vision_config.patch_size) * merge
    sizes = given.grid("image_sizes")
    return [whole(height // edge, width // edge) for height, width in sizes]
