"""Formats a device ``printf``."""

import re


def format_printf(fmt, mem, off, gmem):
    """C printf on a packed argument buffer."""
    import struct

    out, pos = [], 0
    for m in re.finditer(r"%[-+ #0]*\d*(?:\.\d+)?(hh|h|ll|l|z|j|t)?([diouxXeEfFgGaAcsp%])", fmt):
        out.append(fmt[pos : m.start()])
        pos = m.end()
        conv, ln = m.group(2), m.group(1) or ""
        if conv == "%":
            out.append("%")
            continue
        size = 8 if conv in "eEfFgGaAsp" or ln in ("l", "ll", "z", "j", "t") else 4
        off = (off + size - 1) // size * size
        raw = mem[off : off + size].tobytes()
        off += size
        spec = m.group(0).replace(ln, "") if ln else m.group(0)
        if conv in "eEfFgG":
            out.append(spec % struct.unpack("<d", raw)[0])
        elif conv in "aA":
            out.append(struct.unpack("<d", raw)[0].hex())
        elif conv == "s":
            out.append(spec % gmem.cstring(struct.unpack("<Q", raw)[0]))
        elif conv == "p":
            out.append(hex(struct.unpack("<Q", raw)[0]))
        elif conv == "c":
            out.append(chr(raw[0]))
        elif conv in "di":
            out.append(spec % struct.unpack("<q" if size == 8 else "<i", raw)[0])
        else:
            out.append(spec.replace("u", "d") % struct.unpack("<Q" if size == 8 else "<I", raw)[0])
    out.append(fmt[pos:])
    return "".join(out)
