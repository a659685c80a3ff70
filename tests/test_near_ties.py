"""Near ties are drawn anew, and ties are not."""

import pytest

from near_ties import TooClose, apart, away, cut, until_clear


def test_what_is_too_close():
    for values in ([], [1.0], [2.0, 1.0, 2.0], [-3.0, -3.0 + 1e-4], [0.0, 1e-4, 1.0]):
        assert apart(values) is values
    for values in ([1.0, 1.0 + 1e-7], {"a": 0.0, "b": 5.0, "c": 1e-7}, [-2.0, 0.0, -2.0 + 1e-6]):
        with pytest.raises(TooClose):
            apart(values)


def test_differences_are_as_rounded_as_what_they_are_of():
    assert apart([1e-3, 1e-3 + 1e-6])
    with pytest.raises(TooClose):
        apart([1e-3, 1e-3 + 1e-6], size=1.0)


def test_what_is_too_close_to_a_bound():
    for values in ([], [0.0, 2.0], [1.0, 0.5, 0.5 + 1e-7]):
        assert away(values, 1.0) is values
    with pytest.raises(TooClose):
        away([0.0, 1.0 + 1e-7], 1.0)


def test_only_the_cut_of_a_rank_has_to_be_clear():
    ranked = [3.0, 3.0 - 1e-7, 2.0, 1.0, 1.0, 1.0 - 1e-7]
    for count in (0, 2, 3, 4, 6, 9):
        assert cut(ranked, count) == ranked[:count]
    for count in (1, 5):
        with pytest.raises(TooClose):
            cut(ranked, count)


def test_a_check_draws_until_it_is_clear():
    drawn = iter(([1.0, 1.0 + 1e-7], [1.0, 1.0 + 1e-6], [1.0, 2.0], [1.0, 3.0]))
    assert until_clear(lambda: apart(next(drawn))) == [1.0, 2.0]
    assert next(drawn) == [1.0, 3.0]
    with pytest.raises(pytest.fail.Exception, match="5 draws, and in all of them"):
        until_clear(lambda: apart([1.0, 1.0 + 1e-7]), draws=5)
