"""What Triton's kernels use: ``python -m tests.emulation.resources TARGET [--all]``

Compiles the launches that real calls would make on the target (a key of ``aot.TARGETS``) and prints
one line per compiled kernel: registers, spills, shared memory, and what a warp executes for a block
of keys (or queries) that needs no mask, if that takes 8 matrix instructions or more. ``--all``
takes every configuration instead of the main ones. Exits with 1 if a kernel that must not spill
does, or if one needs more shared memory than there is.
Environment: ``TRITON_INTERPRET`` must not be 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.triton.configs import decode_config, heads_per_section, prefill_tile
from gqa_kernels.backends.triton.launch.append import append_launch
from gqa_kernels.backends.triton.launch.backward import backward_launches
from gqa_kernels.backends.triton.launch.base import Launch
from gqa_kernels.backends.triton.launch.forward import decode_launches, prefill_launch
from gqa_kernels.call.append import AppendCall

from .aot import (
    TARGETS,
    Target,
    compile_launch,
    every_option,
    make_backward,
    make_cache,
    make_cache_call,
    make_call,
    resources,
)

HEAD_MAP = HeadMap([0, 0, 0, 0, 0, 1, 2, 2])
KV_LEN = 512
Q_LENS = {"prefill": 256, "backward": 256, "decode": 1, "speculative": 8}


@dataclass(frozen=True)
class Configuration:
    phase: str
    head_dim: int
    dtype: torch.dtype
    options: str

    @property
    def must_not_spill(self) -> bool:
        """Where speed counts most: 16-bit types and the usual head dims and masks."""
        dims = (64, 128) if self.phase == "backward" else (64, 128, 512, 576)
        usual = self.head_dim in dims and self.options in ("none", "causal")
        return usual and self.dtype.itemsize == 2

    def launches(self, target: Target) -> list[Launch]:
        q_len = Q_LENS[self.phase]
        options = {
            "none": {},
            "causal": {"causal": True},
            "every": every_option(q_len, KV_LEN, HEAD_MAP.num_heads, batch=1),
            "dropout": {"causal": True, "dropout_p": 0.1},
        }[self.options]
        _, call = make_call(
            q_len,
            KV_LEN,
            self.head_dim,
            self.dtype,
            value_head_dim=min(self.head_dim, 512),
            head_map=HEAD_MAP,
            batch=1,
            **options,
        )
        if self.phase == "prefill":
            section = heads_per_section(call.shape, target.facts)
            return [prefill_launch(call, prefill_tile(call.shape, target.facts), section)]
        if self.phase == "backward":
            return backward_launches(
                make_backward(call, slopes=self.options == "every"), target.facts
            )
        return decode_launches(call, decode_config(call.shape, target.facts, num_splits=4))


@dataclass(frozen=True)
class CacheConfiguration:
    """Attention over pages, and the append to them, which rotates and, with a format, quantises."""

    phase: str
    head_dim: int
    dtype: torch.dtype
    options: str  # page size, format, "zeros"

    @property
    def must_not_spill(self) -> bool:
        dims = (64, 128, 512) if self.options.isdecimal() else (64, 128)  # without a format
        return self.head_dim in dims and self.phase != "prefill"

    def launches(self, target: Target) -> list[Launch]:
        page_size, _, format = self.options.partition("-")
        format, zeros = format.removesuffix("-zeros") or None, format.endswith("-zeros")
        cache = make_cache(
            HEAD_MAP, [KV_LEN - 40, 33], self.head_dim, self.dtype, int(page_size), format, zeros
        )
        if self.phase == "append":
            table = torch.ones(64, self.head_dim // 2)
            new, q = (torch.ones(2, h, 4, self.head_dim, dtype=self.dtype) for h in (3, 8))
            append = AppendCall.create(
                new, new, cache.view(), q=q, rotary_cos=table, rotary_sin=table
            )
            return [append_launch(append, q)]
        q_lens = [Q_LENS[self.phase], Q_LENS[self.phase] - (self.phase == "prefill")]
        _, call = make_cache_call(q_lens, cache, HEAD_MAP, self.dtype)
        if self.phase == "prefill":
            section = heads_per_section(call.shape, target.facts)
            return [prefill_launch(call, prefill_tile(call.shape, target.facts), section)]
        return decode_launches(call, decode_config(call.shape, target.facts, num_splits=4))


MAIN = [
    Configuration("prefill", 128, torch.bfloat16, "causal"),
    Configuration("prefill", 64, torch.float16, "none"),
    Configuration("prefill", 80, torch.bfloat16, "every"),
    Configuration("decode", 128, torch.bfloat16, "none"),
    Configuration("speculative", 64, torch.float16, "causal"),
    Configuration("prefill", 512, torch.bfloat16, "causal"),
    Configuration("prefill", 576, torch.bfloat16, "causal"),
    Configuration("decode", 576, torch.bfloat16, "none"),
    Configuration("backward", 128, torch.bfloat16, "causal"),
    Configuration("backward", 64, torch.bfloat16, "causal"),
    Configuration("backward", 64, torch.float16, "dropout"),
    CacheConfiguration("decode", 128, torch.bfloat16, "16"),
    CacheConfiguration("decode", 512, torch.bfloat16, "16"),
    CacheConfiguration("decode", 128, torch.bfloat16, "64-fp8_e4m3"),
    CacheConfiguration("decode", 128, torch.float16, "16-int4-zeros"),
    CacheConfiguration("prefill", 128, torch.bfloat16, "16"),
    CacheConfiguration("append", 128, torch.bfloat16, "16-fp8_e4m3"),
]
ALL = [
    Configuration(*values)
    for values in product(
        Q_LENS,
        (64, 80, 128, 256, 512, 576),
        (torch.bfloat16, torch.float16, torch.float32),
        ("none", "causal", "every", "dropout"),
    )
] + [
    CacheConfiguration(*values)
    for values in product(
        ("prefill", "decode", "speculative", "append"),
        (64, 128, 256, 512),
        (torch.bfloat16, torch.float32),
        ("1", "16", "128", "16-fp8_e5m2", "128-int8", "16-int8-zeros", "16-int4"),
    )
]


def lines(
    target: Target, configurations: list[Configuration | CacheConfiguration]
) -> Iterator[tuple[str, bool]]:
    """A printable line for each compiled kernel, and whether it keeps the limits."""
    seen = set()
    for configuration in configurations:
        for launch in configuration.launches(target):
            compiled = compile_launch(launch, target.gpu)
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            used = resources(compiled)
            spill_free = used.spills == 0 or not configuration.must_not_spill
            kept = spill_free and used.shared <= target.shared_bytes
            tile = "x".join(str(launch.arguments.get(f"BLOCK_{x}", "-")) for x in "MN")
            dtype = str(configuration.dtype).removeprefix("torch.")
            line = (
                f"{target.facts.family:6} {launch.kernel.__name__:18} D{configuration.head_dim:<4}"
                f"{dtype:9} {configuration.options:13} {tile:>8} {launch.num_warps} warps "
                f"{used.registers:4} registers {used.spills:5} spills {used.shared:7} B shared"
                + ("" if used.step is None else f" {used.step:5} instructions a step")
            )
            yield line + ("" if kept else "  <- over the limit"), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all", action="store_true", help="every configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for line, kept in lines(TARGETS[arguments.target], ALL if arguments.all else MAIN):
        print(line, flush=True)
        failed |= not kept
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
