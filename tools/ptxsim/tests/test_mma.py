"""mma.sync and ldmatrix/stmatrix against numpy products."""

import ml_dtypes
import numpy as np
import pytest

from .lanes import run

rng = np.random.default_rng(8)


def frag_positions(rows, cols, per_reg, regs, transposed):
    """(row, col) of every element of an A (or, transposed, B) fragment, from the PTX manual."""
    out = []
    for r in range(regs):
        lane_list = []
        for lane in range(32):
            g, t = lane // 4, lane % 4
            elems = []
            for e in range(per_reg):
                if not transposed:
                    row = g + 8 * (r % 2)
                    col = t * per_reg + e + 4 * per_reg * (r // 2)
                    elems.append((row, col))
                else:
                    elems.append((t * per_reg + e + 4 * per_reg * r, g))
            lane_list.append(elems)
        out.append(lane_list)
    return out


def encode(x, ty):
    dt = {
        "f16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
        "tf32": np.float32,
        "s8": np.int8,
        "u8": np.uint8,
    }[ty]
    v = x.astype(dt)
    if ty == "tf32":
        v = (v.view("u4") & np.uint32(0xFFFFE000)).view("f4")
    return v


@pytest.mark.parametrize(
    "shape,ty,acc",
    [
        ("m16n8k8", "f16", "f32"),
        ("m16n8k8", "bf16", "f32"),
        ("m16n8k16", "f16", "f32"),
        ("m16n8k16", "bf16", "f32"),
        ("m16n8k16", "f16", "f16"),
        ("m16n8k4", "tf32", "f32"),
        ("m16n8k8", "tf32", "f32"),
        ("m16n8k16", "s8", "s32"),
        ("m16n8k32", "s8", "s32"),
        ("m16n8k32", "u8", "s32"),
        ("m16n8k32", "e4m3", "f32"),
        ("m16n8k32", "e5m2", "f32"),
    ],
)
def test_mma(shape, ty, acc):
    k = int(shape.split("k")[1])
    eb = {"tf32": 4, "f16": 2, "bf16": 2}.get(ty, 1)
    per = 4 // eb
    na, nb = 16 * k * eb // 128, 8 * k * eb // 128
    lim = 100 if ty in ("s8", "u8") else 1
    src = (
        rng.integers(0 if ty == "u8" else -lim, lim, (24, k))
        if lim > 1
        else rng.normal(0, 1, (24, k))
    )
    A, B = encode(src[:16], ty), encode(src[16:], ty).T
    nc = 2 if acc == "f16" else 4
    C = rng.normal(0, 2, (16, 8)).astype({"f32": "f4", "f16": "f2", "s32": "i4"}[acc])
    ins = []
    for mat, n, tr in ((A, na, False), (B, nb, True)):
        for lanes in frag_positions(0, 0, per, n, tr):
            w = np.array([[mat[p] for p in el] for el in lanes])
            ins.append(np.ascontiguousarray(w).view("u4").reshape(32))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    for r in range(nc):
        if acc == "f16":
            w = np.stack([C[g + 8 * r, 2 * t], C[g + 8 * r, 2 * t + 1]], 1)
            ins.append(np.ascontiguousarray(w).view("u4").reshape(32))
        else:
            ins.append(np.ascontiguousarray(C[g + 8 * (r // 2), 2 * t + r % 2]).view("u4"))

    def vec(p, a, n):
        return "{" + ",".join(f"%{p}{i}" for i in range(a, a + n)) + "}"

    body = (
        f"mma.sync.aligned.{shape}.row.col.{acc}.{ty}.{ty}.{acc} {vec('d', 0, nc)}, {vec('a', 0, na)}, "
        f"{vec('a', na, nb)}, {vec('a', na + nb, nc)};"
    )
    outs = run(body, ins, 4, nout=nc)
    want = A.astype("f8") @ B.astype("f8") + C.astype("f8")
    D = np.zeros((16, 8))
    for r, o in enumerate(outs):
        if acc == "f16":
            v = o.view("f2").reshape(32, 2)
            D[g + 8 * r, 2 * t], D[g + 8 * r, 2 * t + 1] = v[:, 0], v[:, 1]
        else:
            D[g + 8 * (r // 2), 2 * t + r % 2] = o.view("f4" if acc == "f32" else "i4")
    assert np.allclose(
        D, want, rtol=2e-3 if acc == "f16" else 1e-5, atol=1e-2 if acc == "f16" else 1e-4
    )


def test_mma_f64():
    A, B, C = rng.normal(size=(8, 4)), rng.normal(size=(4, 8)), rng.normal(size=(8, 8))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    ins = [x.view("u8") for x in (A[g, t], B[t, g], C[g, 2 * t], C[g, 2 * t + 1])]
    body = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0,%d1}, {%a0}, {%a1}, {%a2,%a3};"
    o = run(body, ins, 8, nout=2)
    D = A @ B + C
    assert np.allclose(o[0].view("f8"), D[g, 2 * t]) and np.allclose(
        o[1].view("f8"), D[g, 2 * t + 1]
    )


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_stmatrix(n, trans):
    data = np.arange(n * 64, dtype="u2") * 7 + 1
    tr = ".trans" if trans else ""
    regs = ",".join(f"%d{i}" for i in range(n))
    init = "".join(
        f"ld.global.b32 %x, [%g+{256 * 0 + 128 * j}]; st.shared.b32 [%m+{128 * j}], %x;\n"
        for j in range(n)
    )
    decl = ".shared .align 16 .b8 sm[1024]; .reg .b32 %x, %m, %r; .reg .b64 %g; .reg .b64 %in;"
    body = f"""ld.param.u64 %in, [p0]; mad.wide.u32 %g, %t, 4, %in; mov.u32 %m, sm; mad.lo.u32 %m, %t, 4, %m;
    {init} bar.sync 0; mov.u32 %r, sm; mad.lo.u32 %r, %t, 16, %r;
    ldmatrix.sync.aligned.m8n8.x{n}{tr}.shared.b16 {{{regs}}}, [%r];
    add.u32 %r, %r, 512;
    stmatrix.sync.aligned.m8n8.x{n}{tr}.shared.b16 [%r], {{{regs}}};
    bar.sync 0;
    """ + "".join(f"ld.shared.b32 %d{n + j}, [%m+{512 + 128 * j}];\n" for j in range(n))
    src = np.concatenate([data.view("u4"), np.zeros(128 - 32 * n, "u4")])[:128]
    outs = run(body, [src], 4, decl, 2 * n)
    lane = np.arange(32)
    for i in range(n):
        mat = data[64 * i : 64 * i + 64].reshape(8, 8)
        mat = mat.T if trans else mat
        want = np.stack([mat[lane // 4, 2 * (lane % 4)], mat[lane // 4, 2 * (lane % 4) + 1]], 1)
        assert np.array_equal(outs[i].view("u2").reshape(32, 2), want)
        assert np.array_equal(outs[n + i], data.view("u4")[32 * i : 32 * i + 32])
