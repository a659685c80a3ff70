"""Oracles that compute otherwise than what they check: what only rounding decides is drawn anew.

An oracle in float64 and a choice made in float32 may rank two values that are 1e-7 apart
differently, and both be right. Such an oracle passes what it compares through `apart`, and the test
draws its inputs within `until_clear`. Values that are equal to the bit, as those of duplicates and
of small whole numbers are, stay: which of equals comes first is part of what is checked.
"""

from collections.abc import Mapping

import numpy as np
import pytest

#: Of the largest value: some ten times what float32 makes of the sums of these tests.
ROUNDING = 1e-5


class TooClose(Exception):
    """Rounding may decide between two of the values that an oracle compares."""


def apart(values, size=0.0):
    """The values, a sequence or mapping, none of which is nearly equal to another; `size`, where
    that is larger, is of the numbers they are differences of."""
    compared = values.values() if isinstance(values, Mapping) else values
    ranked = np.sort(np.asarray(list(compared), np.float64))
    gaps = np.diff(ranked)
    if ((gaps > 0) & (gaps <= ROUNDING * np.abs(ranked).max(initial=size))).any():
        raise TooClose
    return values


def away(values, bound, size=0.0):
    """The values, none of which is nearly the bound."""
    for value in values:
        apart((value, bound), size)
    return values


def cut(ranked, count):
    """The first `count` of values in order, the last of which is not nearly the next."""
    apart(ranked[max(count - 1, 0) : count + 1])
    return ranked[:count]


def until_clear(check, *given, draws=100):
    """check(*given), which draws its inputs: again where these are too close."""
    for _ in range(draws):
        try:
            return check(*given)
        except TooClose:
            pass
    pytest.fail(f"{draws} draws, and in all of them rounding may decide")
