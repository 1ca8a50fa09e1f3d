"""The main loops that are compared, as data: our kernels, the tile, the peer's kernels."""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A package on PyPI whose library holds compiled kernels, and the architecture of its code."""

    package: str
    arch: str


FA3 = Peer("flash-attn3-jax", "sm_90a")
FA3_ALL_DIMS = Peer("fa3-fwd", "sm_90a")
FA2 = Peer("flash-attn-jax", "sm_80")


class Part(NamedTuple):
    """Loops that together make one step: kernels' names, and how many warps run the loop for it."""

    pattern: str
    warps: int


class Row(NamedTuple):
    """One line of the table.

    ``step`` names the tile. ``products`` counts its matrix products: the useful ones, then those
    that our kernels and the peer's execute. Each product is ``tile`` = (m, n, k) multiply-adds.
    """

    name: str
    arch: str
    step: str
    tile: tuple[int, int, int]
    products: tuple[int, int, int]
    ours: tuple[Part, ...]
    peer: Peer
    theirs: tuple[Part, ...]


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


def _sm80(config: str, general: str = "false") -> tuple[Part, ...]:
    return (Part(rf"sm80::prefill_sm80_kernel<gqa::BFloat16, .*::{config}<128>, {general}", 4),)


_FA2_FORWARD = (Part(r"flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, .*bfloat16", 4),)
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
        _sm90(64, 128, 12), FA3_ALL_DIMS, _fa3(192, 128, 64, 12, causal=True)),
    Row("prefill, D 128, causal", "sm_90a", "128 x 128", (128, 128, 128), (2, 2, 2),
        _sm90(128, 128, 8), FA3, _fa3(128, 128, 128, 8, causal=True)),
    Row("prefill, D 128", "sm_90a", "128 x 176", (128, 176, 128), (2, 2, 2),
        _sm90(128, 176, 8), FA3, _fa3(128, 176, 128, 8, causal=False)),
    Row("prefill, D 256, causal", "sm_90a", "128 x 80", (128, 80, 256), (2, 2, 2),
        _sm90(256, 80, 8), FA3_ALL_DIMS, _fa3(128, 80, 256, 8, causal=True)),
    Row("prefill, D 128, dense", "sm_80", "128 x 64", (128, 64, 128), (2, 2, 2),
        _sm80("PrefillConfig"), FA2, _FA2_FORWARD),
    Row("prefill, D 128, masks and softcap", "sm_80", "128 x 64", (128, 64, 128), (2, 2, 2),
        _sm80("PrefillConfig", "true"), FA2, _FA2_FORWARD),
    Row("backward, D 128", "sm_80", "64 x 128", (64, 128, 128), (5, 7, 5),
        _SM80_BACKWARD, FA2, _FA2_BACKWARD),
)  # fmt: skip
