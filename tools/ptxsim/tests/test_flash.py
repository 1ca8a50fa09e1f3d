"""Flash-attention forward in CUDA C++ (mma.sync, ldmatrix, cp.async), against torch."""

import math

import pytest

torch = pytest.importorskip("torch")
TYPES = {"bf16": (torch.bfloat16, "__nv_bfloat16"), "fp16": (torch.float16, "__half")}


def reference(q, k, v, causal):
    s = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.softmax(s, -1) @ v.float(), torch.logsumexp(s, -1)


def run(cuda, *defines, heads=1, n=192, ty="bf16", causal=True, **kw):
    m = cuda("flash_mma.cu", **dict.fromkeys(defines))
    dt, cname = TYPES[ty]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, n, 64, generator=g).to(dt) for _ in range(3))
    o, lse = torch.zeros_like(q), torch.zeros(heads, n)
    r = m.launch(
        f"flash_fwd<{cname}, {str(causal).lower()}>",
        ((n + 63) // 64, heads),
        128,
        [q, k, v, o, lse, n, math.log2(math.e) / 8],
        **kw,
    )
    return r, o, lse, reference(q, k, v, causal)


@pytest.mark.parametrize(
    "ty,causal,n",
    [("bf16", True, 192), ("bf16", True, 101), ("fp16", True, 150), ("bf16", False, 130)],
)
def test_flash_forward(cuda, ty, causal, n):
    r, o, lse, (ref, rl) = run(cuda, heads=2, n=n, ty=ty, causal=causal)
    assert (o.float() - ref).abs().max() < (1.5e-2 if ty == "bf16" else 2e-3)
    assert (lse - rl).abs().max() < 1e-3
    assert r.bank_conflicts == 0 and not r.warnings
    assert r.classes["mma"] > 0 and r.tensor_flops == r.classes["mma"] * 4096
    print("\n" + r.table(5))


def test_seeds_agree(cuda):
    outs = [run(cuda, n=130, seed=s)[1] for s in range(3)]
    assert all(torch.equal(outs[0], x) for x in outs[1:])


def test_fault_names_the_line(cuda):
    from tools import ptxsim

    m = cuda("flash_mma.cu")
    n = 100
    q = torch.zeros(1, n, 64, dtype=torch.bfloat16)
    with pytest.raises(ptxsim.MemoryFault, match="flash_mma.cu"):
        m.launch(
            "flash_fwd<__nv_bfloat16, true>",
            (2, 1),
            128,
            [
                q,
                torch.zeros(1, 90, 64, dtype=torch.bfloat16),
                q.clone(),
                q.clone(),
                torch.zeros(1, n),
                n,
                1.0,
            ],
        )
