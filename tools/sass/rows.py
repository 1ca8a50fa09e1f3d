"""The main loops that are compared, as data: our kernels, the tile, the peer's kernels."""

from __future__ import annotations

from typing import NamedTuple

COPY, PRODUCT = "LDGSTS", "HMMA"
LOOK_UP = r"IMAD\.HI"  # of a page: the multiplication in key / page_size


class Peer(NamedTuple):
    """A package on PyPI whose library holds compiled kernels, and the architecture of its code."""

    package: str
    arch: str


FA3 = Peer("flash-attn3-jax", "sm_90a")
FA3_ALL_DIMS = Peer("fa3-fwd", "sm_90a")
FA2 = Peer("flash-attn-jax", "sm_80")


class Part(NamedTuple):
    """Loops that together make one step: kernels' names, and how many warps run the loop for it.

    ``through``: opcodes that the way around the loop meets as often as it can (without: all matrix
    products and unrolled copies). ``inner``: how often each of its inner loops runs in a step;
    0: they lie on another way.
    """

    pattern: str
    warps: int
    through: str | None = None
    inner: int = 1


class Row(NamedTuple):
    """One line of the table.

    ``step`` names the tile. ``products`` counts its matrix products: the useful ones, then those
    that our kernels and the peer's execute. Each product is ``tile`` = (m, n, k) multiply-adds.
    ``wgmma``: whether ours and theirs are warp-group products. ``bits``: of a stored number of K
    and V, ours and theirs, if the loop is one of decode, whose limit is memory.
    """

    name: str
    arch: str
    step: str
    tile: tuple[int, int, int]
    products: tuple[int, int, int]
    ours: tuple[Part, ...]
    peer: Peer
    theirs: tuple[Part, ...]
    wgmma: tuple[bool, bool] = (False, False)
    bits: tuple[int, int] | None = None


WGMMA = (True, True)


def _sm90(head_dim: int, keys: int, warps: int) -> tuple[Part, ...]:
    return (
        Part(rf"sm90::prefill_kernel<gqa::BFloat16, .*Config<{head_dim}, {keys}>, false", warps),
    )


def _fa3(
    queries: int, keys: int, head_dim: int, warps: int, *, causal: bool, packed: bool = False,
    paged: bool = False,
) -> tuple[Part, ...]:  # fmt: skip
    tile = ", ".join(rf"cute::C<{n}>" for n in (queries, keys, head_dim))
    flags = ", ".join(str(flag).lower() for flag in (causal, False, False, packed, paged))
    return (
        Part(
            rf"MainloopFwdSm90<.*tuple<{tile} ?>, {head_dim}, cutlass::bfloat16_t, float, "
            rf"cutlass::arch::Sm90, {flags},",
            warps,
        ),
    )


def _sm80(
    config: str, warps: int = 4, *, general: bool = False, paged: bool = False, **path: object
) -> tuple[Part, ...]:
    flags = f"{general}, {paged}".lower()
    name = rf"sm80::prefill_sm80_kernel<gqa::BFloat16, .*::{config}<128>, {flags}>"
    return (Part(name, warps, **path),)


# Its inner loops copy row by row what has no place in the fast path.
_PAGED = {"paged": True, "through": f"{COPY}|{PRODUCT}|{LOOK_UP}", "inner": 0}


def _decode(stored: str, bits: int, variant: int, paged: bool = False) -> tuple[Part, ...]:
    """Four warps of 16 keys each: 64 keys a step."""
    own = "BFloat16" if bits == 16 else "Float16"
    name = (
        rf"sm80::decode_kernel<gqa::{own}, gqa::{stored}, .*DecodeConfig<128, {bits}>, "
        rf"\(gqa::cuda::sm80::DecodeVariant\){variant}>"
    )
    return (Part(name, 4, f"{COPY}|{PRODUCT}" + (f"|{LOOK_UP}" if paged else "")),)


_FA2_FORWARD = (Part(r"flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, .*bfloat16", 4),)
# Of 64 query rows and 128 keys; for 64 keys half of it.
_FA2_SPLIT = Part(
    r"flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, .*bfloat16_t> >, "
    r"false, false, false, false, true, false, true, false>",
    4, f"{COPY}|{PRODUCT}",
)  # fmt: skip
_FA2_DECODE = (_FA2_SPLIT._replace(warps=2),)
_FA3_BACKWARD = (
    Part(
        r"MainloopBwdSm90<.*tuple<cute::C<64>, cute::C<128>, cute::C<128> ?>, cutlass::bfloat16_t, "
        r"float, cutlass::arch::Sm90, true, false, false, false, false",
        8,
    ),
)
_SM80_BACKWARD = (
    Part(r"sm80::backward_kv_kernel<gqa::BFloat16, .*BackwardConfig<128>, false", 16),
    Part(r"sm80::backward_q_kernel<gqa::BFloat16, .*BackwardConfig<128>, false", 16),
)
_FA2_BACKWARD = (
    Part(
        r"flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 128, 8, "
        r".*bfloat16.*>, false",
        8,
    ),
)

ROWS = (
    Row("prefill, D 64, causal", "sm_90a", "192 x 128", (192, 128, 64), (2, 2, 2),
        _sm90(64, 128, 12), FA3_ALL_DIMS, _fa3(192, 128, 64, 12, causal=True), WGMMA),
    Row("prefill, D 128, causal", "sm_90a", "128 x 128", (128, 128, 128), (2, 2, 2),
        _sm90(128, 128, 8), FA3, _fa3(128, 128, 128, 8, causal=True), WGMMA),
    Row("prefill, D 128", "sm_90a", "128 x 176", (128, 176, 128), (2, 2, 2),
        _sm90(128, 176, 8), FA3, _fa3(128, 176, 128, 8, causal=False), WGMMA),
    Row("prefill, D 256, causal", "sm_90a", "128 x 80", (128, 80, 256), (2, 2, 2),
        _sm90(256, 80, 8), FA3_ALL_DIMS, _fa3(128, 80, 256, 8, causal=True), WGMMA),
    # Packed and paged calls run the loop of dense ones.
    Row("prefill, D 128, packed", "sm_90a", "128 x 128", (128, 128, 128), (2, 2, 2),
        _sm90(128, 128, 8), FA3_ALL_DIMS, _fa3(128, 128, 128, 8, causal=True, packed=True), WGMMA),
    Row("prefill, D 128, paged", "sm_90a", "128 x 128", (128, 128, 128), (2, 2, 2),
        _sm90(128, 128, 8), FA3, _fa3(128, 128, 128, 8, causal=False, paged=True), WGMMA),
    Row("backward, D 128", "sm_90a", "64 x 128", (64, 128, 128), (5, 7, 5),
        _SM80_BACKWARD, FA3, _FA3_BACKWARD, (False, True)),
    Row("prefill, D 128, dense", "sm_80", "128 x 64", (128, 64, 128), (2, 2, 2),
        _sm80("PrefillConfig"), FA2, _FA2_FORWARD),
    Row("prefill, D 128, masks and softcap", "sm_80", "128 x 64", (128, 64, 128), (2, 2, 2),
        _sm80("PrefillConfig", general=True), FA2, _FA2_FORWARD),
    Row("prefill, D 128, paged", "sm_80", "128 x 64", (128, 64, 128), (2, 2, 2),
        _sm80("PrefillConfig", **_PAGED), FA2, (_FA2_SPLIT,)),
    # A tile is dequantised in shared memory, by loops that each run twice.
    Row("prefill, D 128, quantised", "sm_80", "128 x 32", (128, 32, 128), (2, 2, 2),
        _sm80("QuantizedPrefillConfig", general=True, through=f"{COPY}|STS|{PRODUCT}", inner=2),
        FA2, (_FA2_FORWARD[0]._replace(warps=2),)),
    Row("backward, D 128", "sm_80", "64 x 128", (64, 128, 128), (5, 7, 5),
        _SM80_BACKWARD, FA2, _FA2_BACKWARD),
    *(
        Row(f"decode, D 128, {name}", "sm_80", "16 x 64", (16, 64, 128), (2, 2, 8),
            _decode(stored, bits, variant, paged), FA2, _FA2_DECODE, bits=(bits, 16))
        for name, stored, bits, variant, paged in (
            ("dense", "BFloat16", 16, 0, False),
            ("masks and softcap", "BFloat16", 16, 1, False),
            ("paged", "BFloat16", 16, 0, True),
            ("int8", "Int8", 8, 2, False),
            ("int8, paged", "Int8", 8, 2, True),
            ("fp8_e4m3", "Float8E4M3", 8, 2, False),
            ("int4", "Int4Pair", 4, 2, False),
        )
    ),
)  # fmt: skip
