"""What is particular to the native CPU kernels; the cases that all backends share are elsewhere."""

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.cpu import CPUBackend
from gqa_kernels.native import build
from gqa_kernels.native.schema import DENSE_OUTPUT, FORWARD, OUTPUT
from gqa_kernels.testing import assert_attention_close, make_inputs
from tests.cases.attention import CASES, UNEVEN

pytestmark = pytest.mark.skipif(
    build.unavailable_reason() is not None, reason="no compiled kernels and no compiler"
)
DTYPES = sorted(CPUBackend.capabilities.dtypes, key=str)


ARM_NEEDS = {  # features of /proc/cpuinfo; each set also needs those of the sets before it
    "neon_dot": {"asimddp"},
    "neon_fhm": {"asimdfhm"},
    "neon_bf16": {"bf16", "i8mm"},
}


def _cpu_flags(field: str) -> set[str]:
    info = Path("/proc/cpuinfo")
    return (
        set(info.read_text().partition(field)[2].partition("\n")[0].split())
        if info.exists()
        else set()
    )


def instruction_sets() -> list[str]:
    """Those the processor has, as Linux lists them: the kernels' own choice must agree."""
    if platform.machine() in ("aarch64", "arm64"):
        has = _cpu_flags("Features")
        names = ["portable", "neon"]
        for name, wanted in ARM_NEEDS.items():
            if not wanted <= has:
                break
            names.append(name)
        return names
    flags = _cpu_flags("flags")
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    return ["portable", *(name for name, wanted in needs.items() if wanted <= flags)]


ISAS = instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("GQA_KERNELS_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check(q, k, v, head_map, **options):
    out, lse = asym_gqa_attention(q, k, v, head_map, return_lse=True, backend="cpu", **options)
    assert_attention_close(out, q, k, v, head_map, lse=lse, **options)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_on_every_case(isa, dtype):
    for case in CASES:
        args, options = case.build(dtype, "cpu")
        try:
            check(*args, **options)
        except AssertionError as error:
            raise AssertionError(f"{case.id}: {error}") from error


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=("rows", "invariant"))
def test_sums_over_wide_heads(isa, options):
    """Products of one sign, whose partial sums are large: added one by one over 512 dims, they miss
    the tolerance rule in half of the seeds. Packed tasks have many rows, or are batch invariant."""
    head_map = HeadMap([0, 1, 1, 1])
    for seed in range(6):
        q_len = 2 if options else 40
        q, k, v = make_inputs(1, head_map, q_len, 40, 512, value_head_dim=64, seed=seed)
        check(q.abs(), k.abs(), v, head_map, causal=True, **options)


def test_the_best_instruction_set_is_the_default(monkeypatch):
    build.load()
    monkeypatch.delenv("GQA_KERNELS_CPU_ISA", raising=False)
    assert build.cpu_instruction_set() == ISAS[-1]
    for name in ISAS:
        monkeypatch.setenv("GQA_KERNELS_CPU_ISA", name)
        assert build.cpu_instruction_set() == name


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("GQA_KERNELS_CPU_ISA", "abacus")
    q, k, v = make_inputs(1, UNEVEN, 1, 3, 8)
    with pytest.raises(ValueError, match=r"GQA_KERNELS_CPU_ISA must be .*portable, got abacus"):
        asym_gqa_attention(q, k, v, UNEVEN, backend="cpu")
    with pytest.raises(ValueError, match=r"GQA_KERNELS_CPU_ISA must name .*, got abacus"):
        build.cpu_instruction_set()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(isa, dtype):
    """All remainders of vectors and panels, in both kernels (few rows, many rows)."""
    head_map = HeadMap([0, 0, 1])
    for q_len in (1, 11):
        for dim in [*range(1, 36), 63, 65, 100, 127, 129, 200, 255, 256]:
            q, k, v = make_inputs(
                1, head_map, q_len, 21, dim, value_head_dim=257 - dim, dtype=dtype
            )
            check(q, k, v, head_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_heads, q_len", [(5, 1), (128, 1), (3, 40)])
def test_v_may_be_a_view_of_k(isa, num_heads, q_len, dtype):
    """Latent attention: V is the first 512 of the 576 numbers of K."""
    head_map = HeadMap([0] * num_heads)
    q, latent, _ = make_inputs(2, head_map, q_len, 150, 576, dtype=dtype)
    check(q, latent, latent[..., :512], head_map, causal=True, kv_lengths=[150, 97])


@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_every_kv_length(isa, q_len):
    """All remainders of key blocks, and splits that end anywhere."""
    head_map = HeadMap([0, 1, 0])
    for kv_len in [*range(1, 40), 127, 128, 129, 255, 300, 1025]:
        q, k, v = make_inputs(1, head_map, q_len, kv_len, 16)
        check(q, k, v, head_map, causal=True)


@pytest.mark.parametrize("q_len, kv_len", [(1, 9000), (4, 5000), (70, 3000)])
def test_split_keys_merge_right_and_repeatably(threads, q_len, kv_len):
    """One sequence, few heads: the keys are cut so that all threads have work."""
    head_map = HeadMap([0, 1, 1, 1])
    q, k, v = make_inputs(1, head_map, q_len, kv_len, 64)
    options = {
        "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]),
        "kv_lengths": torch.tensor([[kv_len, 777]]),
    }
    for count in (1, 2, 3, 7):
        threads(count)
        first = check(q, k, v, head_map, **options)
        for _ in range(3):
            again = asym_gqa_attention(q, k, v, head_map, backend="cpu", **options)
            assert torch.equal(first, again)


@pytest.mark.slow
def test_a_long_sequence_in_any_number_of_splits(threads):
    """100,000 keys, cut for as many threads, differ by rounding only."""
    q, k, v = make_inputs(1, HeadMap([0, 1, 1]), 1, 100_000, 16)
    for count in (1, 2, 7, 24):
        threads(count)
        check(q, k, v, HeadMap([0, 1, 1]))


@pytest.mark.parametrize("num_heads, q_len", [(200, 1), (200, 3), (17, 1), (16, 1), (5, 40)])
def test_groups_of_any_size(isa, num_heads, q_len):
    head_map = HeadMap([0] * num_heads + [1])
    q, k, v = make_inputs(1, head_map, q_len, 70, 24)
    check(q, k, v, head_map, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 30])
def test_garbage_beyond_lengths_per_head(isa, dtype, q_len):
    lengths = torch.tensor([[0, 5, 64], [65, 1, 200]], dtype=torch.int32)
    q, k, v = make_inputs(2, UNEVEN, q_len, 200, 40, dtype=dtype)
    clean = check(q, k, v, UNEVEN, kv_lengths=lengths)
    for b in range(2):
        for h in range(3):
            k[b, h, lengths[b, h] :] = torch.nan
            v[b, h, lengths[b, h] :] = torch.inf
    assert torch.equal(
        asym_gqa_attention(q, k, v, UNEVEN, kv_lengths=lengths, backend="cpu"), clean
    )


@pytest.mark.parametrize("q_len", [1, 30])
def test_nan_that_is_seen_is_not_hidden(isa, q_len):
    q, k, v = make_inputs(1, UNEVEN, q_len, 50, 16)
    k[0, 1, 7] = torch.nan
    out, lse = asym_gqa_attention(q, k, v, UNEVEN, return_lse=True, backend="cpu")
    assert out[:, 3].isnan().all() and lse[:, 3].isnan().all()
    assert out[:, [0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("q_len", [2, 30])
def test_masks_of_any_strides(isa, q_len):
    q, k, v = make_inputs(2, UNEVEN, q_len, 45, 16, dtype=torch.bfloat16)
    wide = torch.randn(2, 6, q_len, 90)
    for mask in (
        wide[..., ::2],
        wide[:, :1, :, :45].bfloat16(),
        wide[..., :45].transpose(2, 3).contiguous().transpose(2, 3).bfloat16(),
        wide[:, :, :1, 45:] > 0,
        (wide > 0)[..., 1::2],
        (wide > -1)[:1, :, :, :1],
    ):
        check(q, k, v, UNEVEN, attn_mask=mask)


def structured_masks(q_len, kv_len, heads):
    """Boolean masks that hide whole tiles: a window, a prefix, documents, holes, one head's own."""
    i, j = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
    window = (j <= i) & (j > i - 37)
    per_head = torch.stack([window.roll(50 * h, 1) for h in range(heads)])
    per_head[1] = False
    return {
        "window": window,
        "prefix": (j <= i) | (j < 150),
        "documents": (i // 90 == j // 90) & (j <= i),
        "holes": ((j // 100) % 3 == 1).expand(q_len, kv_len) & (i % 7 != 0),
        "per head": per_head,
        "one for all queries": (j // 130 % 2 == 1)[None],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [2, 130])
def test_masks_that_hide_whole_tiles(isa, q_len, dtype):
    q, k, v = make_inputs(1, UNEVEN, q_len, 500, 16, dtype=dtype)
    with_options = {"window": (260, 9), "softcap": 5.0}
    for name, mask in structured_masks(q_len, 500, 6).items():
        low = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
        for form in (mask, low, low.float() + 0.5 * (torch.arange(500) % 90 == 3)):
            for options in ({}, with_options) if form is mask else (with_options,):
                try:
                    check(q, k, v, UNEVEN, attn_mask=form, **options)
                except AssertionError as error:
                    raise AssertionError(f"{name} as {form.dtype}, {options}: {error}") from error


@pytest.mark.parametrize("q_len", [2, 200])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_tiles_that_a_mask_hides_are_not_computed(isa, dtype, q_len):
    """Not even read: NaN in V would show."""
    q, k, v = make_inputs(1, UNEVEN, q_len, 1280, 16, requires_grad=True)
    hidden = (torch.arange(1280) % 640 >= 256) & (torch.arange(1280) % 640 < 512)
    mask = ~hidden if dtype == torch.bool else torch.zeros(1280).masked_fill(hidden, -torch.inf)
    with torch.no_grad():
        expected = asym_gqa_attention(q, k, v, UNEVEN, attn_mask=mask, backend="cpu")
        v[:, :, 260:508] = torch.nan
        k[:, :, 900:1148] = torch.nan
    out = asym_gqa_attention(q, k, v, UNEVEN, attn_mask=mask, backend="cpu")
    assert torch.equal(out, expected)
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.isfinite().all()
        assert x is q or (grad[:, :, hidden] == 0).all()


def op_arguments(q_len=5, **options):
    q, k, v = make_inputs(2, UNEVEN, q_len, 9, 16)
    call = attention_call(q, k, v, UNEVEN, **options)
    return dict(zip(FORWARD.names, FORWARD.arguments_of(call), strict=True))


def op():
    build.load()
    return torch.ops.gqa_kernels.attention_forward.default


@pytest.mark.parametrize("q_len", [1, 5])
def test_opcheck(q_len):
    everything = {
        "causal": True,
        "softcap": 2.0,
        "alibi_slopes": torch.rand(6),
        "sinks": torch.rand(6),
        "attn_mask": torch.rand(q_len, 9) > 0.2,
        "kv_lengths": torch.tensor([4, 9]),
        "value_head_map": HeadMap([0, 1, 2, 0, 1, 2]),
    }
    for options in ({}, everything):
        for bshd in (False, True):
            arguments = op_arguments(q_len, **options) | {"bshd": bshd}
            torch.library.opcheck(op(), tuple(arguments.values()))
            short = tuple(arguments[name] for name in OUTPUT.names)
            torch.library.opcheck(torch.ops.gqa_kernels.attention_output.default, short)
            shorter = tuple(arguments[name] for name in DENSE_OUTPUT.names)
            torch.library.opcheck(torch.ops.gqa_kernels.attention_dense_output.default, shorter)


def test_out_of_range_map_entries_give_nan_and_read_nothing():
    arguments = op_arguments()
    for bad in (-1, 3, 2**31 - 1, -(2**31)):
        arguments["head_map"] = torch.tensor([0, bad, 2, 1, bad, 0], dtype=torch.int32)
        out, lse = op()(*arguments.values())
        assert out[:, [1, 4]].isnan().all() and lse[:, [1, 4]].isnan().all()
        q, k, v = (arguments[name] for name in "qkv")
        good = asym_gqa_attention(q[:, [0, 2, 3, 5]], k, v, [0, 2, 1, 0])
        torch.testing.assert_close(out[:, [0, 2, 3, 5]], good)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("k", torch.zeros(2, 3, 9, 16, dtype=torch.half), "k must have q's dtype, .* got Half"),
        ("head_map", torch.zeros(6, dtype=torch.long), "head_map must have dtype Int, got Long"),
        (
            "q",
            torch.zeros(2, 6, 5, 32)[..., ::2],
            "q must have a last dim of stride 1, got stride 2",
        ),
        ("v", torch.zeros(2, 3, 9, 600), "v must have a head dim of 1 to 576, got 600"),
        ("v", torch.zeros(2, 3, 8, 16), r"v must have shape \(2, 3, 9, 16\), got \(2, 3, 8, 16\)"),
        ("head_map", torch.zeros(5, dtype=torch.int), r"head_map must have shape \(6\), got \(5\)"),
        (
            "attn_mask",
            torch.zeros(2, 6, 5, 8),
            r"attn_mask must have shape \(2, 6, 5, 9\), got \(2, 6, 5, 8\)",
        ),
        (
            "kv_lengths",
            torch.zeros(2, 1, dtype=torch.int),
            r"kv_lengths must have shape \(2, 3\), got \(2, 1\)",
        ),
    ],
)
def test_op_refuses_what_memory_safety_forbids(name, value, message):
    arguments = op_arguments() | {name: value}
    with pytest.raises(RuntimeError, match=message):
        op()(*arguments.values())


def run_alone(code: str) -> list[float]:
    """Numbers that ``code`` prints in a process of its own."""
    setup = """
        import resource, time, torch
        from gqa_kernels import HeadMap, asym_gqa_attention
        from gqa_kernels.testing import make_inputs
        head_map = HeadMap([0, 0, 0, 1])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code)],
        capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [float(x) for x in result.stdout.split()]


@pytest.mark.parametrize("q_len, kv_len", [(400, 400), (1, 60000)])
def test_number_of_threads_is_torchs(q_len, kv_len):
    """Processor time spent outside the calling thread: none with one thread, some with two."""
    alone, shared = run_alone(f"""
        q, k, v = make_inputs(2, head_map, {q_len}, {kv_len}, 64)
        asym_gqa_attention(q[:, :, :1], k[:, :, :9], v[:, :, :9], head_map, backend="cpu")
        for threads in (1, 2):
            torch.set_num_threads(threads)
            others, process = time.thread_time(), time.process_time()
            for _ in range(10):
                asym_gqa_attention(q, k, v, head_map, backend="cpu")
            own, process = time.thread_time() - others, time.process_time() - process
            print((process - own) / process)
    """)
    assert alone < 0.05 and shared > 0.2


def test_memory_is_bounded_by_tiles():
    """Scores of one head would take 64 MiB, K and V expanded to the query heads 24 MiB more."""
    (grown,) = run_alone("""
        q, k, v = make_inputs(1, head_map, 4096, 4096, 64)
        asym_gqa_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], head_map, backend="cpu")
        out = torch.empty_like(q).fill_(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out2 = asym_gqa_attention(q, k, v, head_map, backend="cpu")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """)
    output = 4 * 4096 * 64 * 4 / 2**20
    assert grown < output + 4
