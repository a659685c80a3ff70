"""Who waits on which paths, read from code written by hand."""

import pytest
from overlap import too_early, waits_for_others
from test_waits import function

STORE = ">  <  STG.E desc[UR4][R2.64], R0\n"
AWAIT = ">  <  ACQBULK\n"
END = ">  <  EXIT\n"
SKIP = ">  <  @P0 BRA 0x20\n"  # the next instruction


@pytest.mark.parametrize(
    "code, early",
    [
        (AWAIT + STORE + END, []),
        (SKIP + AWAIT + AWAIT + STORE + END, []),
        (SKIP + AWAIT + STORE + END, ["STG.E", "EXIT"]),
        (STORE + AWAIT + END, ["STG.E"]),
        (">  <  @!P0 EXIT\n" + AWAIT + STORE + END, ["EXIT"]),
        (">  <  @P0 ACQBULK\n" + END, ["EXIT"]),
        (">  <  LDG.E R0, desc[UR4][R2.64]\n>  <  STS [R1], R0\n" + AWAIT + END, []),
    ],
)
def test_what_comes_before_the_wait_on_some_path_is_found(code, early):
    found = function(code)
    assert waits_for_others(found)
    assert [instruction.opcode for instruction in too_early(found)] == early


def test_who_never_waits_is_known():
    assert not waits_for_others(function(STORE + END))
