"""Command line: ``python -m ptxsim info FILE [--arch sm_80]``."""

import argparse

from .cuda import compile_cuda, ptx_resources
from .launch import demangle
from .module import Module


def main(argv=None):
    """Entry point."""
    ap = argparse.ArgumentParser(prog="ptxsim", description=__doc__)
    sub = ap.add_subparsers(dest="cmd", required=True)
    p = sub.add_parser("info", help="kernels, parameters, shared memory, registers and spills")
    p.add_argument("file", help=".cu or .ptx file")
    p.add_argument("--arch", default="sm_80")
    p.add_argument("-I", dest="inc", action="append", default=[])
    p.add_argument("-D", dest="defs", action="append", default=[])
    a = ap.parse_args(argv)
    if a.file.endswith(".ptx"):
        with open(a.file) as f:
            text = f.read()
    else:
        defs = dict(([*d.split("=", 1), None])[:2] if "=" in d else (d, None) for d in a.defs)
        text = compile_cuda(a.file, a.arch, a.inc, defs)
    mod = Module.from_ptx(text, a.file)
    try:
        res = ptx_resources(text, a.arch)
    except Exception as e:
        print(f"(ptxas: {e})")
        res = {}
    for k in mod.kernels():
        f = mod.ast.functions[k]
        r = res.get(k, {})
        print(demangle(k))
        if demangle(k) != k:
            print(f"  symbol       {k}")
        for i, q in enumerate(f.params):
            n = "" if q.count == 1 else f"[{q.count}]"
            print(f"  param {i:<2}     .{q.type}{n}  ({q.size} bytes, align {q.align})")
        if r:
            print(
                f"  registers    {r.get('registers')}, spill stores {r.get('spill_stores')} B, "
                f"spill loads {r.get('spill_loads')} B, stack {r.get('stack')} B"
            )
            print(f"  shared       {r.get('smem')} B static")
        for at in ("maxntid", "reqntid", "minnctapersm", "reqnctapercluster"):
            if at in f.attrs:
                print(f"  .{at}  {f.attrs[at]}")


if __name__ == "__main__":
    main()
