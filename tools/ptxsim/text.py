"""Lexical helpers of the parser: numbers, names, comments, lists."""

import re
import struct

from .syntax import Imm

ID = r"[A-Za-z_$%][A-Za-z0-9_$]*"
SPECIAL = re.compile(
    r"^%(tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|"
    r"globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(eq|le|lt|ge|gt)|dynamic_smem_size|"
    r"total_smem_size|aggr_smem_size|clusterid|nclusterid|cluster_ctaid|cluster_nctaid|"
    r"cluster_ctarank|cluster_nctarank|is_explicit_cluster|envreg\d+|pm\d+|current_graph_exec|"
    r"reserved_smem_offset_\w+)(\.[xyzw])?$"
)
NUMBER = re.compile(
    r"^[-+]?\s*(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|"
    r"0[bB][01]+U?|\d+\.\d*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+U?)$"
)


def parse_number(text):
    """Parse a PTX literal into an :class:`Imm`."""
    t = text.replace(" ", "")
    neg = t.startswith("-")
    t = t.lstrip("+-")
    low = t.lower()
    if low.startswith("0f") and len(low) == 10:
        v = int(low[2:], 16)
        return Imm(v ^ (0x80000000 if neg else 0), "f")
    if low.startswith("0d") and len(low) == 18:
        v = int(low[2:], 16)
        return Imm(v ^ ((1 << 63) if neg else 0), "d")
    low = low.rstrip("u")
    if low.startswith("0x"):
        v = int(low[2:], 16)
    elif low.startswith("0b"):
        v = int(low[2:], 2)
    elif "." in low or ("e" in low):
        v = struct.unpack("<Q", struct.pack("<d", -float(low) if neg else float(low)))[0]
        return Imm(v, "d")
    elif len(low) > 1 and low.startswith("0"):
        v = int(low, 8)
    else:
        v = int(low)
    return Imm(-v if neg else v, "i")


def split_top(text, sep=","):
    """Split on ``sep`` outside any brackets."""
    out, depth, cur = [], 0, []
    for ch in text:
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        if ch == sep and depth == 0:
            out.append("".join(cur).strip())
            cur = []
        else:
            cur.append(ch)
    last = "".join(cur).strip()
    if last or out:
        out.append(last)
    return out


def strip_comments(text):
    """Blank out comments, keeping newlines so that line numbers hold."""

    def blank(m):
        return "\n" * m.group(0).count("\n")

    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
