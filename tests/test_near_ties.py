"""Near ties are drawn anew, and ties are not."""

import pytest

from near_ties import TooClose, apart, until_clear


def test_what_is_too_close():
    for values in ([], [1.0], [2.0, 1.0, 2.0], [-3.0, -3.0 + 1e-4], [0.0, 1e-4, 1.0]):
        assert apart(values) is values
    for values in ([1.0, 1.0 + 1e-7], {"a": 0.0, "b": 5.0, "c": 1e-7}, [-2.0, 0.0, -2.0 + 1e-6]):
        with pytest.raises(TooClose):
            apart(values)


def test_a_check_draws_until_it_is_clear():
    drawn = iter(([1.0, 1.0 + 1e-7], [1.0, 1.0 + 1e-6], [1.0, 2.0], [1.0, 3.0]))
    assert until_clear(lambda: apart(next(drawn))) == [1.0, 2.0]
    assert next(drawn) == [1.0, 3.0]
    with pytest.raises(pytest.fail.Exception, match="5 draws, and in all of them"):
        until_clear(lambda: apart([1.0, 1.0 + 1e-7]), draws=5)
