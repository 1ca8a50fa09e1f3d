"""Runs a few PTX instructions on the 32 lanes of one warp."""

import numpy as np

from tools import ptxsim

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"
RT = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def run(body, ins, out_width=4, decl="", nout=1):
    """Run ``body`` on 32 lanes: inputs are %a0.., results go to %d0.. (as raw bits)."""
    regs, loads, params = "", "", []
    for k, x in enumerate(ins):
        w = x.dtype.itemsize
        t = RT[w]
        regs += f".reg .{t} %a{k};\n"
        params.append(f".param .u64 p{k}")
        loads += (
            f"ld.param.u64 %p, [p{k}]; mad.wide.u32 %q, %t, {w}, %p; ld.global.{t} %a{k}, [%q];\n"
        )
    stores = ""
    for k in range(nout):
        regs += f".reg .{RT[out_width]} %d{k};\n"
        params.append(f".param .u64 o{k}")
        stores += (
            f"ld.param.u64 %p, [o{k}]; mad.wide.u32 %q, %t, {out_width}, %p; "
            f"st.global.{RT[out_width]} [%q], %d{k};\n"
        )
    text = (
        HEAD + f".visible .entry k({', '.join(params)}) {{\n.reg .b64 %p, %q; .reg .b32 %t;\n"
        f"{regs}{decl}\nmov.u32 %t, %tid.x;\n{loads}{body}\n{stores}ret; }}\n"
    )
    outs = [np.zeros(32, f"u{out_width}") for _ in range(nout)]
    ptxsim.Module.from_ptx(text).launch("k", 1, 32, list(ins) + outs)
    return outs[0] if nout == 1 else outs
