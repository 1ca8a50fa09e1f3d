"""Loops, hot paths and counts of a listing that is written out here."""

import pytest

from tools.sass import model
from tools.sass.__main__ import grown
from tools.sass.disassemble import Instruction, parse
from tools.sass.loops import control_flow, main_loops, natural_loops

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


def test_copies_in_a_loop_of_their_own_are_counted_each():
    copies = """.L_x_1:
        /*0060*/                   LDGSTS.E.128 [R3], [R4] ;
        /*0068*/                   IADD3 R3, R3, R4, RZ ;
        /*006c*/               @P2 BRA `(.L_x_1) ;
        /*006e*/                   NOP ;"""
    (loop,) = main_loops(kernel(LISTING.replace(".L_x_1:", copies)), min_products=2)
    assert loop.per_copy == [3.0]


def test_growth_is_noticed_and_so_is_a_loop_that_vanished():
    assert grown({"a": 105}, {"a": 100}) == []
    assert grown({"a": 106}, {"a": 100}) == ["a: 100 warp instructions a step before, 106 now"]
    assert grown({"a": None}, {"a": 100}) == ["a: its main loop was not found"]


def test_the_model_gives_the_published_speed_of_flash_attention_3():
    """Head dim 128, causal, 128 x 128 tiles, 455 instructions for each of 8 warps; 616 to 661."""
    flop = 4.0 * 128 * 128 * 128
    assert model.tflops(flop, flop, 8 * 455, True) == pytest.approx(657, abs=1)
