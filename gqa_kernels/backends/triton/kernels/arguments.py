"""The NamedTuples that kernels take in place of loose pointers and strides.

Triton passes a tuple's members as if they were separate arguments: it compiles nothing different
for them. Three rules follow from how it specialises them:

- A member that is None is known at compile time, so ``x is None`` in a kernel costs nothing. An
  absent option is None; there is no second argument that says so.
- A member that is ``tl.constexpr`` is known at compile time. CAPITALS mark these members.
- An integer member is always specialised on 1 and on multiples of 16, whatever
  ``do_not_specialize`` says. Strides want that. Lengths and counts change from call to call and
  must not compile another kernel, so they stay separate arguments of the kernels.

Members must not be called ``values`` or ``type``: Triton's own tuple has attributes of that name.
"""

from typing import Any, NamedTuple

Pointer = Any  # a tensor where the kernel is launched, a pointer inside it


class Rows(NamedTuple):
    """Rows of ``[B, H, N, dim]``, or of pages ``[P, H, PAGE_SIZE, dim]``; columns are contiguous.

    Also numbers per row, ``[B, H, N]`` or ``[P, H, PAGE_SIZE]``.
    """

    ptr: Pointer
    stride_b: int  # of a sequence or a page
    stride_h: int
    stride_n: int


class Stored(NamedTuple):
    """K or V as a cache holds it: a number means ``(stored - zero) * scale``."""

    rows: Rows
    scale: Rows | None  # fp32, one per row
    zero: Rows | None  # fp32, one per row
    FORMAT: Any  # see kv.py


class PerHead(NamedTuple):
    """One number per sequence and head: ``[B, H]``."""

    ptr: Pointer
    stride_b: int
    stride_h: int


class Mask(NamedTuple):
    """An attention mask ``[B, Hq, Sq, Sk]``: uint8 hides where it is 0, floats are added."""

    ptr: Pointer
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class Pages(NamedTuple):
    """The page table of a cache: int32 page ids ``[B, Hk, max_pages]``."""

    ptr: Pointer
    stride_b: int
    stride_h: int
    stride_p: int
    PAGE_SIZE: Any


class Partial(NamedTuple):
    """What the splits of a decode leave to the combine kernel: fp32, contiguous."""

    acc: Pointer  # [parts, Hq (sorted), Sq, Dv]; the parts of a sequence follow each other
    sum: Pointer  # [parts, Hq (sorted), Sq]
    max: Pointer  # [parts, Hq (sorted), Sq]


class Dims(NamedTuple):
    """Head dims, and how many columns a tile has: powers of two. Tiles of fewer columns than there
    are: a product over D takes several chunks, and a program writes a slice of the columns."""

    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any


# Tuples that the kernels make. Assigning a tuple to a name turns its ``tl.constexpr`` members into
# values of the run time, so these have none; a None stays what it is.


class Window(NamedTuple):
    """Keys ``[i' - left, i' + right]`` that query position ``i'`` sees; None if unbounded."""

    left: Any
    right: Any


class TileRows(NamedTuple):
    """Facts about the rows of a tile, one vector ``[BLOCK_M]`` each."""

    m_rows: Any  # the row exists
    o_m: Any  # query token of the sequence
    o_token: Any  # the same among all packed tokens, int64
    o_head: Any  # query head, int64; a scalar if all rows have one
    b_slope: Any  # ALiBi slope, or None
    p_mask: Any  # pointer to the row of the mask, or None
    o_dropout_head: Any  # b * Hq + h, or None


class Source(NamedTuple):
    """Where the keys of a tile come from."""

    i_b: Any
    i_k_head: Any
    i_v_head: Any
    n: Any  # number of keys
    begin: Any  # slot of the first key
    i_v_col: Any  # first column of V that the program reads
