"""What an error message says of a value that does not fit: never pages, and nothing waits."""

import pytest
import torch
from torch import nn

from vtp_kernels._shown import shown


class Loud:
    def __repr__(self):
        raise AssertionError("asked for its repr")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (None, "None"),
        ("fast", "'fast'"),
        ((8, 16), "(8, 16)"),
        ({"keep": [1, 2]}, "{'keep': [1, 2]}"),
        (torch.float16, "torch.float16"),
        (torch.zeros(2, 3), "a tensor [2, 3] of float32"),
        (torch.zeros(4, dtype=torch.bool), "a tensor [4] of bool"),
        (nn.Linear(2, 2), "a Linear"),
        (nn.Linear, "the class Linear"),
        (Loud(), "a Loud"),
        ([Loud()], "a list"),
        ({"pixel_values": torch.zeros(3)}, "a dict"),
        (list(range(10_000)), "a list"),
    ],
)
def test_short_and_plain_or_its_kind(value, text):
    assert shown(value) == text


def test_what_holds_itself_has_an_end():
    circle = []
    circle.append(circle)
    assert shown(circle) == "a list"


def test_long_values_are_cut():
    for value in ("x" * 10_000, tuple("x" * 60 for _ in range(60))):
        assert len(shown(value)) <= 80 and shown(value).endswith("...")
