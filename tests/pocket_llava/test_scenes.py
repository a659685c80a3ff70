"""The pocket world: pictures, questions and answers are what they say."""

import numpy as np
import pytest

from vtp_kernels.pocket_llava import scenes

SCENES = 200


@pytest.fixture(scope="module")
def pictures():
    return [scenes.scene("test", index) for index in range(SCENES)]


def test_same_seed_same_picture_and_splits_differ():
    again = scenes.scene("test", 3)
    np.testing.assert_array_equal(scenes.scene("test", 3).image, again.image)
    assert not np.array_equal(scenes.scene("train", 3).image, again.image)


def test_unknown_split_and_kind_are_named():
    with pytest.raises(ValueError, match="split: expected one of train"):
        scenes.scene("validation", 0)
    with pytest.raises(ValueError, match="kind: expected one of color"):
        scenes.ask(scenes.scene("test", 0), np.random.default_rng(0), "size")


def test_objects_are_distinct_small_and_visible(pictures):
    for picture in pictures:
        assert picture.image.shape == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
        assert picture.image.dtype == np.uint8
        assert 2 <= len(picture.things) <= scenes.MAX_OBJECTS
        assert len({t.shape for t in picture.things}) == len(picture.things)
        assert len({t.color for t in picture.things}) == len(picture.things)
        for thing, cover in zip(picture.things, picture.coverage, strict=True):
            assert 1 <= (cover > 0.05).sum() <= 9
            # the shape's area in patches: at least a thin cross, at most a full square
            assert 0.3 < cover.sum() < (2 * thing.radius) ** 2 / scenes.PATCH_SIZE**2


def test_an_object_has_its_color_where_it_is(pictures):
    for picture in pictures:
        for thing in picture.things:
            if scenes.SHAPES[thing.shape] == "ring":
                continue  # its centre shows the background
            seen = picture.image[int(thing.y), int(thing.x)].astype(float)
            distance = {name: np.abs(seen - rgb).sum() for name, rgb in scenes.COLORS.items()}
            assert min(distance, key=distance.get) == scenes.COLOR_NAMES[thing.color]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_are_true(pictures, kind):
    """Read off the scene a second time, from the question's words alone."""
    for index, picture in enumerate(pictures):
        question = scenes.ask(picture, np.random.default_rng(index), kind)
        words = question.text.split()
        assert set(words) | set(question.answer.split()) <= set(scenes.VOCABULARY)
        by_shape = {scenes.SHAPES[t.shape]: t for t in picture.things}
        by_color = {scenes.COLOR_NAMES[t.color]: t for t in picture.things}
        match kind:
            case "color":
                assert by_color[question.answer] is by_shape[words[-1]]
            case "shape":
                assert by_shape[question.answer] is by_color[words[-1]]
            case "count":
                assert int(question.answer) == len(picture.things)
            case "place":
                thing = by_shape[words[-1]]
                vertical, horizontal = question.answer.split()
                assert (vertical == "top") == (thing.y < 112) and (horizontal == "left") == (
                    thing.x < 112
                )
            case "relation":
                a, b = by_shape[words[2]], by_shape[words[-1]]
                holds = {
                    "left": a.x < b.x,
                    "right": a.x > b.x,
                    "above": a.y < b.y,
                    "below": a.y > b.y,
                }[words[3]]
                assert question.answer == ("yes" if holds else "no")


def test_every_answer_occurs(pictures):
    """No question can be answered without looking: no answer has more than 60 % of its kind."""
    for kind in scenes.KINDS:
        answers = [
            scenes.ask(picture, np.random.default_rng(i), kind).answer
            for i, picture in enumerate(pictures)
        ]
        most = max(answers.count(answer) for answer in set(answers))
        assert most < 0.6 * len(answers)


def test_cases_take_the_kinds_in_turn():
    cases = list(scenes.cases("test", 7))
    assert [case.question.kind for case in cases] == [*scenes.KINDS, *scenes.KINDS[:2]]
