"""What the tokens of pictures show that are made squares, each by itself."""

from __future__ import annotations

from ..looks import Given, Looks, View, cells

__all__ = ["squares"]


def squares(given: Given) -> list[Looks]:
    """As many tokens for every picture, in reading order."""
    pixels = given.arguments.get("pixel_values")
    pictures = len(given.runs) if pixels is None else len(pixels)
    tokens, rest = divmod(sum(given.runs), pictures)
    side = round(tokens**0.5)
    if rest or side * side != tokens:
        raise ValueError(
            f"input_ids: {sum(given.runs)} visual tokens are not {pictures} squares of equal size"
        )
    return [Looks(tokens, (View("whole", cells(side, side)),)) for _ in range(pictures)]
