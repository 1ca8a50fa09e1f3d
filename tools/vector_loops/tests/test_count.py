"""Loops and multiply-adds of listings that are written out here."""

import pytest

from tools.vector_loops.__main__ import NEWER, ROWS, SETS, TYPES, find, table
from tools.vector_loops.count import Instruction, Loop, functions, main_loop

X86 = """
0000000000000000 <void gqa::cpu::avx2::DirectProducts<Vec, float>::dot_rows<1>(int, x)>:
       0:\tpush   %rbp
       4:\tmov    (%rdi),%rax
       8:\tvmovups (%rax),%ymm0
       c:\tvfmadd231ps (%rcx),%ymm0,%ymm1
      10:\tvfmadd231ps 0x20(%rcx),%ymm0,%ymm2
      14:\tadd    $0x40,%rax
      18:\tcmp    %rax,%rdx
      1c:\tjne    8 <void gqa::cpu::avx2::DirectProducts<Vec, float>::dot_rows<1>(int, x)+0x8>
      20:\tvfmadd231ss %xmm0,%xmm1,%xmm2
      24:\tjne    4 <void gqa::cpu::avx2::DirectProducts<Vec, float>::dot_rows<1>(int, x)+0x4>
      28:\tret
"""
ARM = """
0000000000000000 <gqa::cpu::neon::f()>:
   0:\tldr\tq0, [x0], #16
   4:\tfmla\tv1.4s, v0.4s, v2.s[0]
   8:\tsmlal2\tv3.4s, v4.8h, v5.8h
   c:\tsubs\tx1, x1, #0x1
  10:\tb.ne\t0 <gqa::cpu::neon::f()>  // b.any
  14:\ttbz\tw0, #3, 1c <gqa::cpu::neon::f()+0x1c>
  18:\tfmadd\ts0, s1, s2, s3
  1c:\tret
"""


def test_the_innermost_loop_counts():
    ((name, code),) = functions(X86)
    assert name.endswith("dot_rows<1>(int, x)")
    assert main_loop(code) == Loop(6, 16)  # without the loop around it, nor its scalar tail


def test_loops_of_aarch64():
    ((_, code),) = functions(ARM)
    assert main_loop(code) == Loop(5, 8)
    assert code[5].target == 0x1C  # a jump forward closes no loop


def test_code_without_a_loop_of_products():
    ((_, code),) = functions(X86.replace("vfmadd231ps", "vaddps"))
    assert main_loop(code) is None


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("vfmadd213ps", "%zmm1,%zmm2,%zmm3", 16),
        ("vpmaddwd", "%ymm1,%ymm2,%ymm3", 16),
        ("vfmadd231sd", "%xmm1,%xmm2,%xmm3", 0),
        ("fmla", "v0.4s, v1.4s, v2.4s", 4),
        ("sdot", "v0.4s, v1.16b, v2.16b", 8),
        ("fmadd", "s0, s1, s2, s3", 0),
    ],
)
def test_multiply_adds_of_an_instruction(name, operands, expected):
    assert Instruction(0, name, operands).multiply_adds == expected


def test_products_of_integers_are_preferred():
    loops = {
        f"void gqa::cpu::avx2::{kind}<gqa::cpu::avx2::Vec, gqa::Int8>::dot_rows<1>(int)": loop
        for kind, loop in (("DirectProducts", Loop(9, 1)), ("Int16Products", Loop(5, 1)))
    }
    assert find(loops, "Int8", "dot_rows<1>") == Loop(5, 1)
    with pytest.raises(ValueError, match=r"no loop of dot_rows<2> over Int8 was found"):
        find(loops, "Int8", "dot_rows<2>")


def test_table():
    def loops(products, loop):
        return {
            f"{products}<gqa::cpu::neon::Vec, {stored}>::{product}_rows<{rows}>(int)": loop
            for stored in TYPES.values()
            for product in ("dot", "add")
            for rows in ROWS
        }

    found = {isa: loops("DirectProducts", Loop(1, 4)) for isa in SETS}
    found["neon_bf16"] |= loops("HalfProducts", Loop(1, 8))
    lines = table(found).splitlines()
    newer = sum(len(NEWER.get(name, [""])) for name in TYPES)
    assert len(lines) == 2 + newer * len(ROWS)
    assert lines[2] == "| fp32 | 1 | 0.25 | 0.25 | 64 | 0.25 | 0.25 | 64 |  |  |  |  |"
    assert (
        "| bf16 | 1 | 0.25 | 0.25 | 64 | 0.25 | 0.25 | 64 | neon_bf16 | 0.12 | 0.12 | 32 |" in lines
    )
