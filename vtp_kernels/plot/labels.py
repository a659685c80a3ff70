"""Names beside what they name, and never over each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .figure import GREY, box_of, darker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Box = tuple[float, float, float, float]
Spot = tuple[float, float]
Line = tuple[Spot, Spot]

LABEL = 9  # points
_LINE = 15.0  # pixels from one line of text to the next
_ROOM = 2  # pixels between two labels, and between a label and a point
_ANGLES = [math.radians(degrees) for degrees in range(0, 360, 15)]
_LENGTHS = (10, 18, 28, 40, 54, 70, 90, 112, 138, 166, 198, 234, 274, 318, 366, 420)
_FAR = 24  # pixels, from where on a line leads from the label to its point


def at_the_end(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names, each at a height of the axes and in a color, right of these; moved apart where their
    heights are too close, in the order of their heights."""
    left, right = axes.get_xlim()
    to_pixels, to_data = axes.transData, axes.transData.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_pixels.transform((right, end[1]))[1] for end in ends]
    bottom = to_pixels.transform((left, axes.get_ylim()[0]))[1]
    for (name, height, color), y in zip(ends, apart(heights, _LINE, bottom), strict=True):
        axes.annotate(
            name,
            (right, height),
            (16, to_data.transform((0, y))[1]),
            textcoords=("offset pixels", "data"),
            fontsize=LABEL,
            color=darker(color),
            parse_math=False,
            va="center",
            annotation_clip=False,
            arrowprops={
                **{"arrowstyle": "-", "color": color, "lw": 0.8},
                **{"shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
            },
        )


def apart(heights: Sequence[float], least: float, floor: float) -> list[float]:
    """Rising numbers as near to the given rising ones as they can be with `least` between two,
    none below `floor`: each group that is too close stays around its middle."""
    groups: list[list[float]] = []  # the wanted heights of labels that touch
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _first(groups[-1], least, floor) < least + _last(
            groups[-2], least, floor
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        _first(group, least, floor) + least * index
        for group in groups
        for index in range(len(group))
    ]


def _first(group: list[float], least: float, floor: float) -> float:
    return max(sum(group) / len(group) - least * (len(group) - 1) / 2, floor)


def _last(group: list[float], least: float, floor: float) -> float:
    return _first(group, least, floor) + least * (len(group) - 1)


def beside_points(
    axes: Axes,
    points: Sequence[tuple[str, float, float, str]],
    others: Sequence[tuple[float, float]] = (),
    curves: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[tuple[Text, Box]] | None:
    """(name, x, y, color), each named as near to its point as there is room; where it is not near,
    a line leads there. No name is over `others` (x, y), points that have none, or over `curves`,
    lines through several. None if no place is found for some of them."""
    spots = [tuple(axes.transData.transform(point[1:3])) for point in points]
    style = {"fontsize": LABEL, "transform": None, "parse_math": False}
    texts = [axes.text(0, 0, name, color=darker(color), **style) for name, _, _, color in points]
    sizes = [(box[2] - box[0], box[3] - box[1]) for box in map(box_of, texts)]
    window = axes.get_window_extent()
    room = (window.x0 + 2, window.y0 + 2, axes.figure.bbox.x1 - 4, window.y1 + 12)
    marks = [_mark(spot) for spot in (*spots, *map(axes.transData.transform, others))]
    drawn = [
        line
        for curve in curves
        for line in itertools.pairwise(tuple(axes.transData.transform(xy)) for xy in curve)
    ]
    for order in _orders(spots):
        boxes = _placed(order, spots, sizes, room, marks, drawn)
        if boxes is not None:
            break
    else:
        return None
    for text, box, spot in zip(texts, boxes, spots, strict=True):
        corner = box_of(text)
        text.set_position((box[0] - corner[0], box[1] - corner[1]))
        line = (spot, _nearest(box, spot))
        if math.dist(*line) > _FAR:
            axes.plot(*zip(*line, strict=True), color=GREY, lw=0.6, transform=None, zorder=1)
    return list(zip(texts, boxes, strict=True))


def _orders(spots: Sequence[Spot]) -> Iterator[list[int]]:
    """In which points may look for a place: where it is most crowded first, then from each side."""

    def crowd(index: int) -> float:
        return sum(1 / (20 + math.dist(spots[index], other)) for other in spots)

    indices = range(len(spots))
    yield sorted(indices, key=crowd, reverse=True)
    for axis, sign in itertools.product((0, 1), (1, -1)):
        yield sorted(indices, key=lambda index, axis=axis, sign=sign: sign * spots[index][axis])


def _placed(
    order: Sequence[int],
    spots: Sequence[Spot],
    sizes: Sequence[Spot],
    room: Box,
    marks: Sequence[Box],
    drawn: Sequence[Line],
) -> list[Box] | None:
    """A box for each point, taken in turn. None if one of them finds none."""
    taken = list(marks)
    lines: list[Line] = list(drawn)
    found: dict[int, Box] = {}
    for index in order:
        spot = spots[index]
        for box in _places(spot, *sizes[index]):
            line = (spot, _nearest(box, spot))
            if _within(box, room) and _free(box, line, taken, lines):
                break
        else:
            return None
        found[index] = box
        taken.append(box)
        if math.dist(*line) > _FAR:
            lines.append(line)
    return [found[index] for index in range(len(spots))]


def _mark(spot: Spot) -> Box:
    """Around a point."""
    x, y = spot
    return x - 5, y - 5, x + 5, y + 5


def _places(spot: Spot, width: float, height: float) -> Iterator[Box]:
    """Boxes around a point, the nearest first: right of it, left of it, then all around."""
    x, y = spot
    for length, angle in itertools.product(_LENGTHS, sorted(_ANGLES, key=_preferred)):
        to_x, to_y = x + length * math.cos(angle), y + length * math.sin(angle)
        left = to_x - width * (1 - math.cos(angle)) / 2
        bottom = to_y - height * (1 - math.sin(angle)) / 2
        yield left, bottom, left + width, bottom + height


def _preferred(angle: float) -> float:
    """Right and left before above and below."""
    return abs(math.sin(angle)) + 0.1 * (math.cos(angle) < 0)


def _nearest(box: Box, spot: Spot) -> Spot:
    left, bottom, right, top = box
    return min(max(spot[0], left), right), min(max(spot[1], bottom), top)


def _within(box: Box, room: Box) -> bool:
    return box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]


def _free(box: Box, line: Line, taken: list[Box], lines: list[Line]) -> bool:
    """Nothing under the box, and under its line only what covers its own point anyway."""
    if any(overlap(box, other) for other in taken):
        return False
    if any(_crosses(other, box) for other in lines):
        return False
    if math.dist(*line) <= _FAR:
        return True
    others = [other for other in taken if not _covers(other, line[0])]
    return not any(_crosses(line, other) for other in others)


def _covers(box: Box, spot: Spot) -> bool:
    return box[0] <= spot[0] <= box[2] and box[1] <= spot[1] <= box[3]


def overlap(a: Box, b: Box, room: float = _ROOM) -> bool:
    """Whether there are less than so many pixels between two boxes."""
    return a[0] < b[2] + room and b[0] < a[2] + room and a[1] < b[3] + room and b[1] < a[3] + room


def _crosses(line: Line, box: Box) -> bool:
    """Whether a line goes through a box: what is left of it between the sides of each axis."""
    begin, end = 0.0, 1.0
    for axis in (0, 1):
        start, step = line[0][axis], line[1][axis] - line[0][axis]
        low, high = box[axis] - start, box[axis + 2] - start
        if step == 0:
            if low > 0 or high < 0:
                return False
            continue
        enters, leaves = sorted((low / step, high / step))
        begin, end = max(begin, enters), min(end, leaves)
    return begin <= end
