"""Other lengths find the compiled kernel: ``python -m tests.emulation.compile_keys TARGET``

Makes the launches of calls that differ in their numbers of tokens, keys, sequences and pages, and
takes the key by which Triton looks up the compiled kernel of each (``aot.Specialisation``). Prints
the number of keys of each kernel, and exits with 1 if there are more kernels than the calls need.
Environment: ``TRITON_INTERPRET`` must not be 1.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from gqa_kernels import HeadMap
from gqa_kernels.backends.triton.configs import Tile, decode_config
from gqa_kernels.backends.triton.launch.backward import kv_launches, q_launch
from gqa_kernels.backends.triton.launch.base import Launch
from gqa_kernels.backends.triton.launch.forward import decode_launches, prefill_launch

from .aot import (
    TARGETS,
    Specialisation,
    Target,
    make_backward,
    make_cache,
    make_cache_call,
    make_call,
)

HEAD_MAP = HeadMap([0, 0, 0, 1, 2, 2])
TILE = Tile(64, 32, 4, 2)
WINDOWS = (None, None), (7, 0), (16, 1), (100, 32)


def launches(target: Target) -> Iterator[tuple[str, Launch]]:
    """Launches that may not differ in what is compiled, by the name of their kind."""
    for batch, q_len, kv_len in (1, 64, 80), (2, 100, 333), (3, 17, 1024), (1, 1, 1):
        _, call = make_call(
            q_len, kv_len, 64, torch.bfloat16, head_map=HEAD_MAP, batch=batch, dropout_p=0.1
        )
        yield "prefill", prefill_launch(call, TILE, 2 + batch)
        backward = make_backward(call)
        yield "backward_q", q_launch(backward, TILE, 2 + batch)
        (launch,) = kv_launches(backward, TILE)
        yield "backward_kv", launch
        _, call = make_call(q_len, kv_len, 64, torch.bfloat16, head_map=HEAD_MAP, batch=batch)
        for splits in (5, 8):
            config = decode_config(call.shape, target.facts, splits)
            for launch in decode_launches(call, config):
                block = launch.arguments.get("BLOCK_M", "")
                yield f"{launch.kernel.__name__} {block}", launch
    for window in WINDOWS[1:]:  # bounded on both sides: shorter than the keys and the queries
        _, call = make_call(200, 333, 64, torch.bfloat16, head_map=HEAD_MAP, batch=1, window=window)
        yield "prefill, window", prefill_launch(call, TILE, 3)
    for lengths in ([620, 300], [320, 33, 70], [40, 10]):
        cache = make_cache(HEAD_MAP, lengths, 64, torch.bfloat16, page_size=16)
        _, call = make_cache_call([40, *[20] * (len(lengths) - 1)], cache, HEAD_MAP, torch.bfloat16)
        yield "prefill, pages", prefill_launch(call, TILE, 3)
        _, call = make_cache_call([1] * len(lengths), cache, HEAD_MAP, torch.bfloat16)
        for launch in decode_launches(call, decode_config(call.shape, target.facts)):
            yield f"{launch.kernel.__name__}, pages", launch


def main() -> None:
    torch.set_num_threads(1)
    target = TARGETS[sys.argv[1]]
    keys = defaultdict(set)
    for kind, launch in launches(target):
        keys[kind].add(Specialisation.of(launch, target.gpu).key)
    for kind, found in keys.items():
        print(f"{kind}: {len(found)} kernels")
        if len(found) > 1:
            print(*sorted(found), sep="\n")
    raise SystemExit(any(len(found) > 1 for found in keys.values()))


if __name__ == "__main__":
    main()
