"""The reader of machine code, and what it counts as a wait, on code written by hand."""

import dataclasses

import pytest
from round_trips import RoundTrips, round_trips
from sass import Flow, Function, functions
from waits import described, source_lines

# As cuobjdump prints it; the addresses are made to follow one another.
LISTING = """
	code for sm_90
	.target	sm_90

		Function : _Z4copyPf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/              @!P0 BRA 0x40 ;                                            /* 0x0000001c00348947 */
                                                                                         /* 0x000fec0003800000 */
        /*0010*/                   LDG.E R24, desc[UR16][R22.64] ;                       /* 0x0000001016187981 */
                                                                                         /* 0x000ea8000c1e1900 */
        /*0020*/                   LDG.E R27, desc[UR16][R22.64+0x4] ;                   /* 0x00000410161b7981 */
                                                                                         /* 0x000ee2000c1e1900 */
        /*0030*/                   FMNMX R25, R21, R24, !PT ;                            /* 0x0000001815197209 */
                                                                                         /* 0x004fc80007800000 */
        /*0040*/                   EXIT ;                                                /* 0x000000000000794d */
                                                                                         /* 0x000fea0003800000 */
        /*0050*/                   BRA 0x50;                                             /* 0xfffffffc00fc7947 */
                                                                                         /* 0x000fc0000383ffff */
		..........

	code for sm_120
		Function : _Z4sortPf
        /*0000*/                   DEPBAR.LE SB0, 0x0, {4,3,2,1} ;                       /* 0x0000801e0000791a */
                                                                                         /* 0x000e240000000000 */
"""  # noqa: E501


def test_a_listing_is_read():
    copy, sort = functions(LISTING.splitlines())
    assert [(f.arch, f.name) for f in (copy, sort)] == [("9.0", "_Z4copyPf"), ("12.0", "_Z4sortPf")]
    branch, load, other, use, end, trap = copy.instructions
    assert (branch.predicate, branch.opcode, branch.operands) == ("@!P0", "BRA", "0x40")
    assert (load.address, load.name, load.modifiers) == (0x10, "LDG", ".E")
    assert str(load) == "LDG.E R24, desc[UR16][R22.64]"
    assert (load.scoreboard, other.scoreboard, use.scoreboard) == (2, 3, None)
    assert (load.awaited, use.awaited) == (0, 1 << 2)
    assert (str(end), str(trap)) == ("EXIT", "BRA 0x50")
    (depbar,) = sort.instructions
    assert (depbar.scoreboard, str(depbar)) == (0, "DEPBAR.LE SB0, 0x0, {4,3,2,1}")


def test_what_cannot_be_read_is_told():
    without = [
        line for line in LISTING.splitlines() if "FMNMX" not in line and "0x004f" not in line
    ]
    with pytest.raises(ValueError, match="what comes before 0040 in _Z4copyPf cannot be read"):
        list(functions(without))


def function(code: str) -> Function:
    """Code with one instruction a line, each with its scoreboard (>2) and those it awaits (<01) in
    front, printed as cuobjdump does and read back."""
    listing = ["\tcode for sm_90", "\t\tFunction : kernel"]
    lines = [line.split(None, 2) for line in code.strip().splitlines()]
    for i, (sets, awaits, text) in enumerate(lines):
        board = int(sets[1:] or 7)
        bits = sum(1 << int(number) for number in awaits[1:])
        control = board << 46 | 7 << 49 | bits << 52
        listing += [
            f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0000000000000000 */",
            f"                                              /* 0x{control:016x} */",
        ]
    (found,) = functions(listing)
    return found


def trips(code: str) -> RoundTrips:
    return round_trips(function(code).instructions)


def counts(code: str) -> tuple[int, int, int, float]:
    found = trips(code)
    return found.first, found.trips, len(found.waits), found.loads_per_wait


USE = ">  <0 FADD R0, R0, R1\n"
END = ">  <  EXIT"


def test_loads_one_after_the_other_are_as_many_trips():
    assert counts(">0 <  LDG.E R1, desc[UR4][R2.64]\n" + USE + END) == (1, 1, 1, 1.0)
    assert counts((">0 <  LDG.E R1, desc[UR4][R2.64]\n" + USE) * 8 + END) == (8, 8, 8, 1.0)


def test_loads_together_are_one_trip():
    """On one scoreboard, or each on its own: the second is back when the first is."""
    one = ">0 <  LDG.E R1, desc[UR4][R2.64]\n"
    assert counts(one * 8 + USE + END) == (1, 1, 1, 8.0)
    other = ">1 <  @P0 LD.E R4, desc[UR4][R2.64]\n"
    use_other = ">  <1 FADD R0, R0, R4\n"
    assert counts(one + other + USE + use_other + END) == (1, 1, 1, 2.0)
    assert counts(one + USE + other + use_other + END) == (2, 2, 2, 1.0)


def test_a_load_in_the_shadow_of_another_is_a_trip_of_its_own():
    """It starts before the wait for the first is over, and is back one trip after its start."""
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >1 <0 LDG.E R4, desc[UR4][R1.64]
        >  <1 FADD R0, R0, R4
    """
    assert counts(code + END) == (2, 2, 2, 1.0)


def test_a_load_may_be_waited_for_after_a_barrier():
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <  BAR.SYNC.DEFER_BLOCKING 0x0
        >  <0 FADD R0, R0, R1
    """
    assert counts(code + END) == (0, 1, 1, 1.0)
    assert counts(code.replace("<  BAR", "<0 BAR") + END) == (1, 1, 1, 1.0)
    assert counts(code.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "UCGABAR_WAIT") + END)[:2] == (0, 1)
    assert counts(code.replace("BAR.SYNC.DEFER_BLOCKING", "BAR.ARV") + END)[:2] == (1, 1)
    far = code.replace(">  <0", ">  <  @P0 BRA 0x40\n>  <  NOP\n>  <0")
    assert counts(far + END) == (0, 1, 1, 1.0)


def test_another_scoreboard_is_not_the_loads():
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >1 <  MUFU.EX2 R4, R4
        >  <1 FADD R0, R0, R4
    """
    assert counts(code + END) == (0, 0, 0, 0.0)
    assert counts(code.replace("MUFU.EX2 R4, R4", "LDG.E R4, desc[UR4][R6.64]") + USE + END)[1] == 1


def test_a_wait_for_operands_is_not_one_for_the_load():
    """A load's second scoreboard, in bits 49 to 51, is free once its address is read."""
    load, *rest = function(">  <  LDG.E R1, desc[UR4][R2.64]\n" + USE + END).instructions
    assert load.control >> 46 == 0b111111  # none of either sort
    read_0, set_0 = (dataclasses.replace(load, control=x << 46) for x in (0b000111, 0b111000))
    assert round_trips([read_0, *rest]).trips == 0
    assert round_trips([set_0, *rest]).trips == 1


@pytest.mark.parametrize(
    "other",
    ("LDC R1, c[0x0][0x28]", "ULDC.64 UR4, c[0x0][0x208]", "S2R R1, SR_TID.X", "LDS R1, [R2]"),
)
def test_constants_and_shared_memory_are_no_trips(other):
    assert counts(f">0 <  {other}\n" + USE + END) == (0, 0, 0, 0.0)


def test_a_move_to_a_uniform_register_waits_like_any_other():
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >1 <0 R2UR UR6, R1
        >  <1 UIADD3 UR6, UR6, 0x1, URZ
    """
    assert counts(code + END) == (1, 1, 1, 1.0)


def test_the_longer_of_two_branches_counts():
    code = """
        >  <  @P0 BRA 0x40
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <0 FADD R0, R0, R1
        >  <  BRA 0x80
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >1 <0 LDG.E R1, desc[UR4][R1.64]
        >2 <1 LDG.E R4, desc[UR4][R1.64]
        >  <  NOP
        >  <2 FADD R0, R0, R4
    """
    assert counts(code + END) == (3, 3, 4, 1.0)
    other_way_round = """
        >  <  @P0 BRA 0x50
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >1 <0 LDG.E R4, desc[UR4][R1.64]
        >  <1 FADD R0, R0, R4
        >  <  BRA 0x70
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <0 FADD R0, R0, R1
        >2 <  LDG.E R1, desc[UR4][R2.64]
        >  <2 FADD R0, R0, R1
    """
    assert counts(other_way_round + END) == (3, 3, 4, 1.0)


def test_narrow_loads_are_no_trips_of_wide_ones():
    code = """
        >0 <  LDG.E.{} R1, desc[UR4][R2.64]
        >1 <0 LDG.E R1, desc[UR4][R1.64]
        >  <1 FADD R0, R0, R1
        >2 <  LDG.E.128 R4, desc[UR4][R2.64]
        >  <2 FADD R0, R0, R4
    """
    for narrow in ("U8", "S8.CONSTANT", "U16"):
        found = trips(code.format(narrow) + END)
        assert (found.trips, found.wide) == (3, 2)
    assert trips(code.format("64") + END).wide == 3


def test_a_loop_is_gone_through_once():
    code = """
        >3 <  LDC R7, c[0x0][0x28]
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <0 FADD R0, R0, R1
        >  <  @P0 BRA 0x10
    """
    found = trips(code + END)
    assert (found.first, found.trips) == (1, 1)
    (loop,) = found.loops
    assert (loop.address, loop.slots, loop.trips) == (0x10, 3, 1)
    assert str(loop) == "3 (1)"


def test_what_an_iteration_loads_for_the_next_is_a_trip_of_the_loop():
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <0 FADD R0, R0, R1
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <  @P0 BRA 0x10
        >  <0 FADD R0, R0, R1
    """
    found = trips(code + END)
    assert (found.trips, found.loops[0].trips) == (2, 1)
    assert [len(wait.loads) for wait in found.waits] == [
        2,
        1,
    ]  # of the start or of the last iteration


def test_a_loop_that_ends_in_its_middle_is_left_there():
    """What its second half waits for counts, though the way out is before it."""
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <0 ISETP.NE.AND P0, PT, R1, RZ, PT
        >  <  @!P0 BRA 0x60
        >1 <  LDG.E R4, desc[UR4][R2.64]
        >  <1 FADD R0, R0, R4
        >  <  BRA 0x0
        >2 <  LDG.E R5, desc[UR4][R2.64]
        >  <2 FADD R0, R0, R5
    """
    assert counts(code + END) == (3, 3, 3, 1.0)


def test_loops_within_loops():
    code = """
        >  <  MOV R3, RZ
        >  <  MOV R4, RZ
        >  <  IADD3 R4, R4, 0x1, RZ
        >  <  @P1 BRA 0x20
        >  <  BAR.SYNC.DEFER_BLOCKING 0x0
        >  <  @P0 BRA 0x10
    """
    loops = trips(code + END).loops
    assert [(x.address, x.slots) for x in loops] == [(0x10, 3), (0x20, 2)]


def test_code_moved_out_of_the_way_is_no_loop():
    code = """
        >  <  @P0 BRA 0x30
        >  <  FADD R0, R0, R1
        >  <  EXIT
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <  BRA 0x10
    """
    assert trips(code.replace(">  <  FADD", ">  <0 FADD")).trips == 1
    assert Flow(function(code).instructions).loops == {}


def test_groups_of_copies_are_waited_for_in_order():
    """cp.async: LDGDEPBAR closes a group, DEPBAR waits until so many groups are left."""
    copy = ">  <  LDGSTS.E.BYPASS.128 [R3], desc[UR6][R18.64]\n>0 <  LDGDEPBAR\n"
    wait = ">  <  DEPBAR.LE SB0, {}\n"
    assert counts(copy + wait.format("0x1") + END) == (0, 0, 0, 0.0)
    assert counts(copy + wait.format("0x0") + END) == (1, 1, 1, 1.0)
    assert counts(copy * 2 + wait.format("0x1") + wait.format("0x0") + END) == (1, 1, 1, 2.0)
    assert counts(copy + wait.format("0x0") + copy + wait.format("0x0") + END) == (2, 2, 2, 1.0)
    assert counts(">0 <  LDGDEPBAR\n" + wait.format("0x0") + END) == (0, 0, 0, 0.0)
    # Two groups ahead, what a loop waits for has brought the next two along.
    loop = copy * 2 + copy + wait.format("0x2") + ">  <  @P0 BRA 0x40\n" + END
    assert trips(loop).loops[0].trips == pytest.approx(1 / 3, abs=0.01)


def test_what_a_warp_that_fell_apart_runs_is_left_out():
    code = """
        >  <  BRA.DIV UR4, 0x20
        >  <  EXIT
        >0 <  LD.E R1, desc[UR4][R2.64]
        >  <0 FADD R0, R0, R1
        >  <  BRA 0x10
    """
    flow = Flow(function(code).instructions)
    assert list(flow.blocks) == [0x00, 0x10] and len(flow.reached) == 5
    assert trips(code).trips == 0


def test_a_call_is_passed_over_or_not_come_back_from():
    code = """
        >0 <  LDG.E R1, desc[UR4][R2.64]
        >  <  @!P0 CALL.REL.NOINC 0x40
        >  <0 FADD R0, R0, R1
        >  <  EXIT
        >1 <0 {load}
        >  <1 FADD R0, R0, R1
        >  <  {end}
    """
    load, back = "LDG.E R1, desc[UR4][R2.64]", "RET.REL.NODEC R4 0x0"
    assert trips(code.format(load=load, end="EXIT")).trips == 2
    assert trips(code.format(load="MUFU.RCP R1, R1", end=back)).trips == 1
    with pytest.raises(ValueError, match="what a called function waits for is not known"):
        trips(code.format(load=load, end=back))


@pytest.mark.parametrize(
    "code, words",
    [
        (">  <  BRX R4 -0x730", "where it leads is not known"),
        (">  <  UBLKCP [UR8], [UR4], UR6", "how it is waited for is not known"),
        (">  <  DEPBAR {1}", "what it waits for is not known"),
        (">  <  BSSY B0, 0x40\n>  <  BSYNC B0", "is not where its BSSY says"),
        (">  <  EXIT\n>0 <  LDG.E R1, desc[UR4][R2.64]", "no path from the start leads here"),
    ],
)
def test_code_that_is_not_understood_is_told(code, words):
    with pytest.raises(ValueError, match=words):
        trips(code + "\n" + END)


LINES = """
	.section	.text.kernel,"ax",@progbits
	//## File "/src/csrc/vtp/parts.cuh", line 27 inlined at "/src/csrc/op.cu", line 9
	//## File "/src/csrc/op.cu", line 9
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
	//## File "/cuda/include/device.hpp", line 107 inlined at "/src/csrc/op.cu", line 10
	//## File "/src/csrc/op.cu", line 10
        /*0010*/                   FADD R0, R0, R1 ;
.L_x_1:
        /*0020*/                   EXIT ;
"""


def test_a_kernel_is_described():
    lines = source_lines(LINES.splitlines())
    assert lines == {
        ("kernel", 0x00): "parts.cuh:27 < op.cu:9",
        ("kernel", 0x10): "op.cu:10",
        ("kernel", 0x20): "op.cu:10",
    }
    found = function(">0 <  LDG.E R1, desc[UR4][R2.64]\n" + USE + END)
    assert described("op: kernel", found, round_trips(found.instructions), lines).splitlines() == [
        "op: kernel on 9.0",
        "  round trips to the first barrier: 1, to the end: 1, of wide loads: 1; waits: 1, "
        "loads a wait: 1.0",
        "  0010 op.cu:10: FADD R0, R0, R1",
        "    waits for",
        "      0000 parts.cuh:27 < op.cu:9: LDG.E R1, desc[UR4][R2.64]",
    ]
