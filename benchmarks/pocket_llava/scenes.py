"""The pocket world: small coloured shapes on noisy backgrounds, and questions about them.

A scene is 224 x 224 pixels and holds 2 to 6 objects. Shapes and colours are all different within
a scene, so "the circle" and "the red one" name one object each. An object is 20 to 30 pixels wide,
one to two 14-pixel patches: most visual tokens show background, and losing the few that matter
loses the answer. Grey specks are distractors: they never count.

Everything is drawn from a `numpy.random.Generator`; `scene(split, index)` is the same everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 224
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (160, 50, 200),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 220),
    "pink": (250, 140, 195),
}
COLOR_NAMES = tuple(COLORS)
KINDS = ("color", "shape", "place", "count", "relation")
MAX_OBJECTS = len(SHAPES)
SPLITS = {"train": 0, "calibration": 1, "test": 2, "demo": 3}

VOCABULARY = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>"),
    *("what", "color", "shape", "is", "the", "where", "how", "many", "shapes"),
    *("left", "right", "of", "above", "below", "top", "bottom", "yes", "no"),
    *("1", "2", "3", "4", "5", "6"),
    *SHAPES,
    *COLOR_NAMES,
)

# 4 x 4 cells of 56 pixels; with 14 pixels of jitter an object stays clear of its neighbours and of
# the picture's middle lines, so that "top left" is never a matter of opinion.
_CELLS = 4
_CELL = IMAGE_SIZE / _CELLS
_JITTER = 14.0
_RADIUS = (10.0, 14.0)


@dataclass(frozen=True)
class Thing:
    """One object: indices into SHAPES and COLOR_NAMES, centre and radius in pixels."""

    shape: int
    color: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it.

    image uint8 [224, 224, 3]; coverage float32 [objects, GRID, GRID]: share of a patch that the
    object fills.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    coverage: np.ndarray


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Case:
    scene: Scene
    question: Question


def cases(split: str, count: int) -> Iterator[Case]:
    """The first `count` questions of a split, one per picture, the kinds in turn."""
    for index in range(count):
        yield case(split, index)


def case(split: str, index: int, kinds: tuple[str, ...] = KINDS) -> Case:
    """Question number `index` of a split in which these kinds take turns."""
    picture = scene(split, index)
    kind = kinds[index % len(kinds)]
    return Case(picture, ask(picture, generator(split, 1_000_000 + index), kind))


def scene(split: str, index: int, objects: tuple[int, int] = (2, MAX_OBJECTS)) -> Scene:
    """Scene number `index` of a split ("train", "calibration", "test", "demo")."""
    return draw_scene(generator(split, index), objects)


def generator(split: str, index: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return np.random.default_rng((SPLITS[split], index))


def draw_scene(rng: np.random.Generator, objects: tuple[int, int] = (2, MAX_OBJECTS)) -> Scene:
    n = int(rng.integers(objects[0], objects[1] + 1))
    cells = rng.permutation(_CELLS * _CELLS)[:n]
    shapes, colors = rng.permutation(len(SHAPES))[:n], rng.permutation(len(COLORS))[:n]
    things = []
    for cell, shape, color in zip(cells, shapes, colors, strict=True):
        x, y = (
            (v + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER)
            for v in (cell % _CELLS, cell // _CELLS)
        )
        things.append(
            Thing(int(shape), int(color), float(x), float(y), float(rng.uniform(*_RADIUS)))
        )

    canvas = _background(rng)
    for _ in range(int(rng.integers(4, 10))):
        speck = Thing(
            int(rng.integers(len(SHAPES))), 0, *rng.uniform(4, IMAGE_SIZE - 4, 2), rng.uniform(2, 4)
        )
        if all(
            (speck.x - t.x) ** 2 + (speck.y - t.y) ** 2 > (t.radius * 1.4 + 6) ** 2 for t in things
        ):
            _paint(canvas, speck, np.full(3, rng.uniform(100, 190), np.float32))
    coverage = np.zeros((n, GRID, GRID), np.float32)
    for i, thing in enumerate(things):
        rgb = np.float32(COLORS[COLOR_NAMES[thing.color]]) + rng.uniform(-12, 12, 3).astype(
            np.float32
        )
        coverage[i] = _paint(canvas, thing, rgb)
    canvas += rng.integers(-10, 11, canvas.shape, dtype=np.int8)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(things), coverage)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark colour that drifts over the picture."""
    base, slope = rng.uniform(20, 80, 3), rng.uniform(-20, 20, (2, 3))
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    return (base + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]).astype(
        np.float32
    )


def _signed_distance(shape: int, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    ax, ay = np.abs(dx), np.abs(dy)
    match SHAPES[shape]:
        case "circle":
            return np.hypot(dx, dy) - r
        case "square":
            return np.maximum(ax, ay) - 0.85 * r
        case "triangle":
            return np.maximum(dy - 0.8 * r, 0.88 * ax - 0.47 * (dy + r))
        case "cross":
            return np.minimum(np.maximum(ax - r, ay - 0.33 * r), np.maximum(ay - r, ax - 0.33 * r))
        case "ring":
            return np.abs(np.hypot(dx, dy) - 0.75 * r) - 0.25 * r
        case "bar":
            return np.maximum(ax - 1.1 * r, ay - 0.4 * r)
    raise AssertionError(shape)


def _paint(canvas: np.ndarray, thing: Thing, rgb: np.ndarray) -> np.ndarray:
    """Blends one thing into the canvas in place; returns the share of each patch it covers."""
    lo = [int(max(0, v - thing.radius * 1.3 - 2)) for v in (thing.y, thing.x)]
    hi = [int(min(IMAGE_SIZE, v + thing.radius * 1.3 + 3)) for v in (thing.y, thing.x)]
    dy = np.arange(lo[0], hi[0], dtype=np.float32)[:, None] + np.float32(0.5 - thing.y)
    dx = np.arange(lo[1], hi[1], dtype=np.float32)[None, :] + np.float32(0.5 - thing.x)
    alpha = np.clip(0.5 - _signed_distance(thing.shape, dx, dy, np.float32(thing.radius)), 0, 1)
    window = canvas[lo[0] : hi[0], lo[1] : hi[1]]
    window += alpha[..., None] * (rgb - window)
    rows, cols = np.arange(lo[0], hi[0]) // PATCH_SIZE, np.arange(lo[1], hi[1]) // PATCH_SIZE
    cover = np.zeros((GRID, GRID), np.float32)
    np.add.at(cover, (rows[:, None], cols[None, :]), alpha)
    return cover / PATCH_SIZE**2


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """A question about the scene; `kind` is one of KINDS, None draws one."""
    kind = kind or KINDS[int(rng.integers(len(KINDS)))]
    first, second = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    name = SHAPES[first.shape]
    if kind == "color":
        return Question(kind, f"what color is the {name}", COLOR_NAMES[first.color])
    if kind == "shape":
        return Question(kind, f"what shape is {COLOR_NAMES[first.color]}", name)
    if kind == "place":
        return Question(kind, f"where is the {name}", place(first))
    if kind == "count":
        return Question(kind, "how many shapes", str(len(scene.things)))
    if kind == "relation":
        return _relation(first, second, rng)
    raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def place(thing: Thing) -> str:
    """The quarter of the picture that a thing is in, two words: "top left"."""
    half = IMAGE_SIZE / 2
    return f"{'top' if thing.y < half else 'bottom'} {'left' if thing.x < half else 'right'}"


def _relation(a: Thing, b: Thing, rng: np.random.Generator) -> Question:
    """Asked along an axis in which the two lie in different cells, at least 28 pixels apart."""
    axes = [
        axis
        for axis in ("x", "y")
        if int(getattr(a, axis) // _CELL) != int(getattr(b, axis) // _CELL)
    ]
    axis = axes[int(rng.integers(len(axes)))]
    less, more = {"x": ("left of", "right of"), "y": ("above", "below")}[axis]
    word = (less, more)[int(rng.integers(2))]
    holds = (getattr(a, axis) < getattr(b, axis)) == (word == less)
    text = f"is the {SHAPES[a.shape]} {word} the {SHAPES[b.shape]}"
    return Question("relation", text, "yes" if holds else "no")
