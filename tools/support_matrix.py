"""The table of what each backend supports, from the capabilities that backends declare.

``python -m tools.support_matrix`` writes it into ``README.md`` (in short) and ``docs/support.md``;
with ``--check`` it changes nothing and fails if a file is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gqa_kernels.backends.base import Capabilities
from gqa_kernels.backends.dispatch import BACKENDS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
NAMES = ("cpu", "cuda", "triton", "reference")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
NO_LIMIT = 1 << 16  # of the head dim, in the reference's capabilities
RUNS_ON = {
    "cpu": "any CPU; C++ for AMX, AVX-512, AVX2, NEON or portable, chosen at run time",
    "cuda": "NVIDIA sm_80 and newer; **has not run on a GPU yet**",
    "triton": "NVIDIA sm_80 and newer, AMD; **has not run on a GPU yet**",
    "reference": "any device of torch; eager, slow",
}
OPTIONS = {
    "value_head_map": "separate map for V",
    "window": "sliding window",
    "softcap": "softcap",
    "alibi": "ALiBi",
    "sinks": "attention sinks",
    "bool_mask": "boolean mask",
    "additive_mask": "additive mask",
    "kv_lengths": "lengths per sequence or KV head",
    "device_map": "map in a device tensor",
    "dropout": "dropout",
    "batch_invariant": "`batch_invariant`",
    "varlen_mask": "mask over packed queries",
    "varlen_dropout": "dropout over packed queries",
    "key_ranges": "range of keys per query (`key_ranges`)",
    "mask_gradient": "gradient of an additive mask",
    "torch_func": "`torch.func`, forward mode",
}
CACHES = {
    "dense": "dense cache",
    "paged": "paged cache",
    "kv_begin": "left padding",
    "varlen": "packed sequences",
    "fp8_e4m3": "fp8 e4m3 cache",
    "fp8_e5m2": "fp8 e5m2 cache",
    "int8": "int8 cache",
    "int4": "int4 cache",
    "k8v4": "cache with int8 keys and int4 values",
}
SHORT = ("window", "bool_mask", "dropout", "batch_invariant", "paged", "int8")  # for the README


def rows() -> dict[str, Callable[[Capabilities], str]]:
    """By feature, what a backend's cell says."""
    found: dict[str, Callable[[Capabilities], str]] = {
        "types": lambda c: ", ".join(n for t, n in DTYPES.items() if _named(t, c)),
        "largest D and Dv": lambda c: "any" if c.max_head_dim >= NO_LIMIT else str(c.max_head_dim),
        "backward": lambda c: _mark(c.autograd),
        "backward of packed sequences": lambda c: _mark(c.varlen_autograd or c.cache_autograd),
        "backward over a cache": lambda c: _mark(c.cache_autograd),
    }
    for option, label in OPTIONS.items():
        found[label] = lambda c, option=option: _mark(option in c.options)  # type: ignore[misc]
    for kind, label in CACHES.items():
        found[label] = lambda c, kind=kind: _mark(kind in c.caches)  # type: ignore[misc]
    return found


def table(features: Sequence[str] | None = None) -> str:
    """Markdown, of all features or of some."""
    lines = ["| |" + "|".join(f" `{name}` " for name in NAMES) + "|", "|---|" + "---|" * len(NAMES)]
    lines.append("| runs on | " + " | ".join(RUNS_ON[name] for name in NAMES) + " |")
    for label, cell in rows().items():
        if features is None or label in features:
            cells = (cell(BACKENDS[name].capabilities) for name in NAMES)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table() -> str:
    labels = OPTIONS | CACHES
    return table(["types", "largest D and Dv", "backward", *(labels[name] for name in SHORT)])


def with_block(text: str, block: str) -> str:
    """A page with its block replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"a page must have one {BEGIN} and one {END}, got another count")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n\n{block}\n\n{END}", text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.support_matrix", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    check = parser.parse_args(argv).check
    stale = False
    for path, made in ((ROOT / "README.md", short_table()), (ROOT / "docs/support.md", table())):
        text = path.read_text(encoding="utf-8")
        renewed = with_block(text, made)
        if check and renewed != text:
            print(f"{path.name} is stale: run python -m tools.support_matrix", file=sys.stderr)
        elif renewed != text:
            path.write_text(renewed, encoding="utf-8")
        stale |= renewed != text
    return 1 if check and stale else 0


def _mark(has: bool) -> str:
    return "yes" if has else "no"


def _named(dtype: str, capabilities: Capabilities) -> bool:
    return any(str(x) == f"torch.{dtype}" for x in capabilities.dtypes)


if __name__ == "__main__":
    sys.exit(main())
