"""The first minutes on a machine: build, load, and one call of each op against the reference.

    python -m benchmarks.studies.first_calls --json first.json
    python -m benchmarks.studies.first_calls --sanitizer compute-sanitizer --only decode prefill

The calls run in a child process, which reports before and after each one. A call that kills the
process, hangs, or leaves the GPU unusable becomes a row too; the remaining calls continue in a new
process. The JSON file is written after every call. Exit status: 1 if any call failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from gqa_kernels import HeadMap, PagedKVCache, asym_gqa_attention, asym_gqa_varlen_attention
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.backends.order import ORDER
from gqa_kernels.decode import asym_gqa_decode, decode_call
from gqa_kernels.native import build
from gqa_kernels.testing import (
    assert_attention_close,
    assert_cache_close,
    assert_gradients_close,
    make_inputs,
)

MAP = HeadMap([1, 0, 1, 1, 3, 1, 0, 3], num_kv_heads=4)  # uneven, interleaved, an empty group
DTYPE = torch.bfloat16
CALL_SECONDS = 60  # for each call; Triton compiles at the first one
FATAL = ("CUDA error", "illegal memory access", "unspecified launch failure")


def _decode(device: str, backend: str) -> None:
    _attention(device, backend, 1, 700, 128)


def _prefill(device: str, backend: str) -> None:
    _attention(device, backend, 300, 300, 128, causal=True)


def _prefill_with_options(device: str, backend: str) -> None:
    heads = MAP.num_heads
    options = {
        "window": (100, 7), "softcap": 3.0, "sinks": torch.linspace(-1, 1, heads, device=device),
        "alibi_slopes": torch.linspace(0, 0.2, heads, device=device),
    }  # fmt: skip
    _attention(device, backend, 200, 260, 96, **options)


def _attention(device: str, backend: str, q_len: int, kv_len: int, dim: int, **options) -> None:
    q, k, v = make_inputs(2, MAP, q_len, kv_len, dim, dtype=DTYPE, device=device)
    out, lse = asym_gqa_attention(q, k, v, MAP, backend=backend, return_lse=True, **options)
    assert_attention_close(out, q, k, v, MAP, lse=lse, **options)


def _packed(device: str, backend: str) -> None:
    lengths = [70, 1, 200]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    q, k, v = make_inputs(1, MAP, sum(lengths), sum(lengths), 64, dtype=DTYPE, device=device)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    out = asym_gqa_varlen_attention(
        *packed, MAP, offsets, offsets, max(lengths), max(lengths), causal=True, backend=backend
    )
    for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        own = out[begin:end].transpose(0, 1)[None]
        assert_attention_close(own, *part, MAP, causal=True)


def _paged_cache(device: str, backend: str, format: str | None = None) -> None:
    """Append, then decode and a longer chunk, over pages."""
    pages, page_size, dim = 30, 16, 128
    pool = PagedKVCache.empty(
        pages, page_size, MAP.num_kv_heads, dim, dtype=DTYPE, device=device, format=format
    )
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    table = order.view(2, -1).to(device, torch.int32)
    cache = pool.at(table, torch.zeros(2, dtype=torch.int32, device=device))
    q, k, v = make_inputs(2, MAP, 150, 200, dim, dtype=DTYPE, device=device)
    cache.append(k, v, backend=backend)
    for count in (1, 150):
        few = q[:, :, :count]
        out = asym_gqa_decode(few, cache, MAP, backend=backend)
        assert_cache_close(out, decode_call(few, cache, MAP))


def _quantized_cache(device: str, backend: str) -> None:
    _paged_cache(device, backend, "int8")


def _backward(device: str, backend: str) -> None:
    q, k, v = make_inputs(2, MAP, 150, 150, 64, dtype=DTYPE, device=device, requires_grad=True)
    out = asym_gqa_attention(q, k, v, MAP, causal=True, backend=backend)
    dout = torch.randn_like(out)
    gradients = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), dout), strict=True))
    q, k, v = (x.detach() for x in (q, k, v))
    assert_gradients_close(gradients, q, k, v, MAP, dout=dout, causal=True)


def _graph(device: str, backend: str) -> None:
    """A replayed decode reads the map's contents at replay, not those at capture."""
    q, k, v = make_inputs(2, MAP, 1, 700, 128, dtype=DTYPE, device=device)
    head_map = torch.tensor(list(MAP), dtype=torch.int32, device=device)
    asym_gqa_attention(q, k, v, head_map, backend=backend)  # loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = asym_gqa_attention(q, k, v, head_map, backend=backend)
    changed = HeadMap([0, 0, 1, 2, 2, 2, 3, 1], num_kv_heads=4)
    head_map.copy_(torch.tensor(list(changed)))
    graph.replay()
    torch.cuda.synchronize()
    assert_attention_close(out, q, k, v, changed)


CALLS: dict[str, Callable[[str, str], None]] = {
    "decode": _decode,
    "prefill": _prefill,
    "prefill with options": _prefill_with_options,
    "packed": _packed,
    "paged cache": _paged_cache,
    "quantised cache": _quantized_cache,
    "backward": _backward,
    "graph": _graph,
}


def _work(names: Sequence[str], device: str) -> None:
    """In the process of its own: a line of JSON before each call and one after it."""

    def tell(**row: Any) -> None:
        print(json.dumps(row), flush=True)

    for name in names:
        tell(begin=name)
        call, backend = name.rsplit(" on ", 1)
        started = time.monotonic()
        status, why = "ok", ""
        try:
            CALLS[call](device, backend)
            if device == "cuda":
                torch.cuda.synchronize()
        except AssertionError as error:
            status, why = "wrong", str(error)
        except Exception as error:
            status, why = "error", f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - started, 2)
        tell(call=name, status=status, reason=why[:2000], seconds=seconds)
        if any(word in why for word in FATAL):
            return  # the context is gone: a new process goes on


def _build(part: str) -> dict[str, Any]:
    """A row for building and loading a part of the compiled library."""
    started = time.monotonic()
    status, why = "ok", ""
    try:
        build.load(part)
        why = build.cuda_build_info() if part == "cuda" else build.cpu_instruction_set() or ""
    except RuntimeError as error:
        status, why = "error", str(error)
    seconds = round(time.monotonic() - started, 2)
    return {"call": f"build {part}", "status": status, "reason": why[:2000], "seconds": seconds}


def run_calls(
    names: Sequence[str], device: str, sanitizer: Sequence[str], save: Callable[[dict], None],
    limit: float = CALL_SECONDS,
) -> None:  # fmt: skip
    """Have calls run in processes of their own, and save a row for each."""
    waiting = list(names)
    while waiting:
        command = [*sanitizer, sys.executable, "-m", __spec__.name, "--work",
                   *waiting, "--device", device]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            current = _follow(process, waiting, save, limit)
            process.kill()
            status = process.wait()
        if current is not None:
            why = f"no answer within {limit:g} s" if status == -9 else f"exit status {status}"
            save({"call": current, "status": "died", "reason": why})
            waiting.remove(current)
        elif sanitizer and status not in (0, -9):
            save({"call": shlex.join(sanitizer), "status": "error", "reason": f"exit {status}"})


def _follow(
    process: subprocess.Popen, waiting: list[str], save: Callable[[dict], None], limit: float
) -> str | None:
    """Save the rows that a process reports. Returns the call in which it died or hung, or None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    current: str | None = waiting[0]  # until it says so: it could not even start
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            return current
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            return current
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if "begin" in row:
                current = row["begin"]
            elif "call" in row:
                save(row)
                waiting.remove(row["call"])
                current = None


def names_of(device: str, only: Sequence[str] | None = None) -> list[str]:
    """The calls for a device: each op on each fused backend that looks usable."""
    backends = [name for name in ORDER[device] if name != "reference"]
    backends = [name for name in backends if BACKENDS[name].unavailable_reason() is None]
    ops = [name for name in CALLS if only is None or name in only]
    if device != "cuda":
        ops = [name for name in ops if name != "graph"]
    return [f"{op} on {backend}" for backend in backends for op in ops]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.first_calls", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=CALLS, help="these ops")
    parser.add_argument(
        "--sanitizer", type=shlex.split, default=[], help="program to run them under"
    )
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        _work(arguments.work, arguments.device)
        return 0
    rows = []
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text())["rows"]
    before = len(rows)

    def save(row: dict[str, Any]) -> None:
        if arguments.sanitizer:
            row["under"] = shlex.join(arguments.sanitizer)
        rows.append(row)
        print(f"{row['call']:32} {row['status']:6} {row.get('seconds', '')} {row['reason'][:200]}")
        if arguments.json:
            whole = {"rows": rows, "commit": os.environ.get("GIT_COMMIT", "")}
            arguments.json.write_text(json.dumps(whole, indent=1) + "\n")

    if not arguments.sanitizer:
        for part in ("cpu", "cuda") if arguments.device == "cuda" else ("cpu",):
            save(_build(part))
    names = names_of(arguments.device, arguments.only)
    if not names:
        save({"call": "all", "status": "error", "reason": f"no backend for {arguments.device}"})
    run_calls(names, arguments.device, arguments.sanitizer, save)
    return 1 if any(row["status"] != "ok" for row in rows[before:]) else 0


if __name__ == "__main__":
    sys.exit(main())
