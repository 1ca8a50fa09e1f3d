"""Loops, hot paths and counts of a listing that is written out here."""

import re

import pytest

from tools.sass import model
from tools.sass.__main__ import grown, instructions, predicted
from tools.sass.disassemble import Instruction, parse
from tools.sass.loops import control_flow, main_loops, natural_loops, walk_through
from tools.sass.rows import ROWS, Part

# A loop with a masked tile that the hot path leaves out, and a branch around the copies.
LISTING = """
\t.section\t.text._Z4loopv,"ax",@progbits
.text._Z4loopv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   FMUL R4, R4, R5 ;
        /*0040*/                   FMUL R4, R4, R5 ;
        /*0050*/                   FMUL R4, R4, R5 ;
.L_x_1:
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   MUFU.EX2 R7, R7 ;
        /*0090*/              @!P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
\t.section\t.debug_frame,"",@progbits
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
"""


def kernel(listing: str = LISTING):
    (found,) = parse(listing)
    return found


def test_the_listing_is_read_up_to_the_next_section():
    found = kernel()
    assert found.name == "_Z4loopv" and len(found.instructions) == 11
    assert found.labels == {".L_x_0": 1, ".L_x_1": 6}
    assert found.instructions[2] == Instruction(0x20, "@P0 BRA `(.L_x_1)")
    assert found.instructions[2].operation == "BRA"


def test_the_loop_and_its_hot_path():
    found = kernel()
    graph = control_flow(found)
    assert natural_loops(graph) == {1: {1, 2, 3}}
    (loop,) = main_loops(found, min_products=2)
    assert loop.address == 0x10 and loop.size == 9
    assert [i.operation for i in loop.path] == ["HMMA", "HMMA", "MUFU", "BRA", "ISETP", "BRA"]
    assert loop.counts["matrix"] == 2 and loop.counts["ex2"] == 1 and not loop.counts["FMUL"]
    assert main_loops(found, min_products=3) == []


def test_code_behind_an_indirect_jump_is_searched_too():
    found = kernel(LISTING.replace("MOV R1, c[0x0][0x28]", "BRX R2 -0x20"))
    assert len(main_loops(found, min_products=2)) == 1


@pytest.mark.parametrize("jump", ["BRA.DIV ~URZ, `(.L_x_9)", "BRA.CONV ~URZ, `(.L_x_9)",
                                  "@P3 CALL.REL.NOINC `(.L_x_9)",
                                  "BRX R2 -0x20 (*\"BRANCH_TARGETS .L_x_9,.L_x_8\"*)"])  # fmt: skip
def test_detours_into_a_loop_do_not_hide_it(jump):
    """A cold block that is left and entered in the middle of the loop belongs to it."""
    listing = LISTING.replace("/*0040*/                   FMUL R4, R4, R5", f"/*0040*/ {jump}")
    listing = listing.replace(
        "        /*0050*/", ".L_x_8:\n        /*0050*/"
    ).replace(
        "/*00a0*/                   EXIT ;",
        "/*00a0*/                   EXIT ;\n.L_x_9:\n        /*00b0*/   NOP ;\n"
        "        /*00c0*/   BRA `(.L_x_8) ;",
    )  # fmt: skip
    (loop,) = main_loops(kernel(listing), min_products=2)
    assert loop.address == 0x10 and len(loop.path) == 6


def test_the_way_through_copies():
    """Around the branch lies the shortest way; through it are the copies, and an inner loop."""
    copies = LISTING.replace("FMUL R4, R4, R5", "LDGSTS.E.128 [R3], [R4]")
    copies = copies.replace("        /*0050*/", ".L_x_5:\n        /*0050*/").replace(
        ".L_x_1:\n", "        /*0058*/               @P4 BRA `(.L_x_5) ;\n.L_x_1:\n"
    )
    found = kernel(copies)
    short, through = (
        walk_through(found, 0x10, re.compile(pattern)) for pattern in ("HMMA", "HMMA|LDGSTS")
    )
    assert (len(short.instructions), short.inner) == (6, 0)
    assert (len(through.instructions), through.inner) == (10, 2)
    (loop,) = main_loops(found, min_products=2)
    assert instructions(found, loop, Part("", 1, "HMMA|LDGSTS", inner=3)) == 10 + 2 * 2
    assert instructions(found, loop, Part("", 1, "HMMA|LDGSTS", inner=0)) == 6


def test_every_kind_of_loop_has_a_row():
    names = " ".join(f"{row.arch} {row.name}" for row in ROWS)
    for word in ("packed", "paged", "quantised", "int8", "int4", "fp8", "decode", "backward"):
        assert word in names
    assert len({(row.arch, row.name) for row in ROWS}) == len(ROWS)


def test_decode_is_predicted_in_bytes():
    """int8 reads half of what bf16 reads in a step of as many instructions."""
    rows = {row.name: row for row in ROWS}
    dense, int8 = rows["decode, D 128, dense"], rows["decode, D 128, int8"]
    assert (predicted(dense, 0, 2000), predicted(int8, 0, 2000)) == ("10.8 TB/s", "5.4 TB/s")
    assert model.terabytes(32768, 0, 4 * 1000) == pytest.approx(32768 / 1000 * 132 * 1.755e9 / 1e12)


def test_growth_is_noticed_and_so_is_a_loop_that_vanished():
    assert grown({"a": 105}, {"a": 100}) == []
    assert grown({"a": 106}, {"a": 100}) == ["a: 100 warp instructions a step before, 106 now"]
    assert grown({"a": None}, {"a": 100}) == ["a: its main loop was not found"]


def test_the_model_gives_the_published_speed_of_flash_attention_3():
    """Head dim 128, causal, 128 x 128 tiles, 455 instructions for each of 8 warps; 616 to 661."""
    flop = 4.0 * 128 * 128 * 128
    assert model.tflops(flop, flop, 8 * 455, True) == pytest.approx(657, abs=1)
