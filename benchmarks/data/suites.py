"""The suites: which cases are measured together, and which of them the documentation shows."""

from __future__ import annotations

from dataclasses import replace

from .cases import Case, backward, decode, end_to_end, over_caches, prefill
from .instances import SearchCase
from .models import MILD, SKEWED
from .scaling import scaling_cases

BOTH = ("even", SKEWED)
SMOL = ("even", "4-3-2")
WIDE = ("gemma-4", "wide-320")
GROUP_SIZES = ("uneven-2", "uneven-3", "uneven-4", "uneven-6")
BF16, FP16, FP32 = "bfloat16", "float16", "float32"

AnyCase = Case | SearchCase

QUICK: list[AnyCase] = [
    *decode("llama-3-8b", BOTH, 1, 256, BF16, FP32),
    *decode("llama-3-8b", BOTH, 1, 4096, BF16),
    *decode("llama-2-7b", ("uneven-4",), 1, 1024, BF16),
    *decode("smollm2-135m", SMOL, 4, 1024, FP32),
    *prefill("llama-3-8b", BOTH, 1, 256, BF16, FP32),
    *prefill("vit-b", ("uneven-3",), 2, 197, FP32),
    *prefill("t5-base", ("uneven-3",), 1, 128, FP32),
    *backward("smollm2-135m", SMOL, 1, 256, FP32),
    *over_caches("smollm2-135m", ("4-3-2",), 1, 1024, "pages16-int8"),
    SearchCase("planted", 12, 4, "free"),
    *end_to_end("smollm2-4-layers", ("4-3-2",), 1, 64, 4, FP32),
]

CACHE_KINDS = (
    "pages16", "pages64", "pages16-budgets", "dense-fp8_e4m3", "dense-int8", "dense-int4",
    "pages16-int8",
)  # fmt: skip
CACHES = [
    *over_caches("llama-3-8b", BOTH, 1, 8192, *CACHE_KINDS),
    *over_caches("llama-3-8b", (SKEWED,), 8, 8192, *CACHE_KINDS),
    # One query head per KV head: nothing but memory bounds bf16.
    *over_caches(
        "llama-2-7b", ("even",), 4, 8192, "pages16", "dense-fp8_e4m3", "dense-int8", "pages16-int8"
    ),
]

SEARCHES = [
    SearchCase("aligned_cosine", 12, 4, "free"),
    SearchCase("planted", 32, 8, "1..6"),
    SearchCase("aligned_cosine", 32, 8, "equal"),
]

PEER_CACHES = [  # kinds of cache that vLLM's and onnxruntime's kernels have, on even maps
    replace(decode("llama-3-8b", ("even",), batch, 8192, dtype)[0], op="decode-cache", cache=cache)
    for batch, dtype, cache in (
        (1, BF16, "pages16"), (8, BF16, "pages128"), (1, BF16, "pages128-fp8_e4m3"),
        (1, FP32, "pages128"), (1, FP32, "dense-int8"),
    )
]  # fmt: skip

CPU: list[AnyCase] = [
    # Bandwidth versus context; at 8192 also the other types and a batch.
    *decode("llama-3-8b", BOTH, 1, 8192, BF16, FP32),
    *decode("llama-3-8b", BOTH, 8, 8192, BF16),
    *(c for n in (128, 1024, 4096) for c in decode("llama-3-8b", BOTH, 1, n)),
    *decode("llama-3-8b", (SKEWED,), 1, 8192, FP16),
    *prefill("llama-3-8b", BOTH, 1, 1024, BF16, FP32),
    *backward("llama-3-8b", BOTH, 1, 512, BF16, FP32),
    *over_caches("llama-3-8b", (SKEWED,), 1, 8192, "pages16", "dense-int8", "pages16-int8"),
    *PEER_CACHES,
    *end_to_end("smollm2-135m", SMOL, 1, 128, 8, FP32),
    *SEARCHES,
    # Skew at a constant number of KV heads, and scattered, pruned and cut maps.
    *decode("llama-3-8b", (MILD, "giant", "interleaved", "pruned", "tp-3"), 1, 4096),
    *decode("llama-3-70b", ("uneven-6",), 1, 2048),
    *decode("qwen2.5-7b", ("even", "tp-3"), 1, 4096),
    # Speed-up versus group size, on the models that AsymGQA converts.
    *decode("llama-2-7b", ("even", *GROUP_SIZES), 1, 2048),
    *decode("opt-1.3b", ("uneven-4",), 4, 2048),
    *decode("smollm2-135m", SMOL, 1, 2048, FP32),
    *decode("llama-3-8b", (SKEWED,), 1, 512, cold=True),
    *prefill("llama-3-8b", (SKEWED,), 1, 1024, FP16),
    *prefill("llama-3-8b", ("giant", "interleaved", "pruned"), 1, 512),
    *prefill("llama-2-7b", ("uneven-3",), 1, 512),
    *prefill("opt-1.3b", ("uneven-4",), 1, 512, FP32),
    *prefill("smollm2-135m", ("4-3-2",), 1, 1024, FP32),
    *prefill("vit-s", ("uneven-2",), 8, 197, FP32),
    *prefill("vit-b", ("even", "uneven-3"), 8, 197, FP32),
    *prefill("vit-l", ("uneven-4",), 4, 197, FP32),
    *prefill("t5-base", ("even", "uneven-3"), 2, 512, FP32),
    # Head dims above 256.
    *(c for m in WIDE for c in decode(m, ("even", "uneven-4"), 1, 4096, BF16, FP32)),
    *(c for m in WIDE for c in prefill(m, ("even", "uneven-4"), 1, 1024, BF16, FP32)),
    *backward("llama-3.2-1b", (SKEWED,), 1, 512, BF16),
    *backward("vit-b", ("uneven-3",), 8, 197, FP32),
]

CPU_GOALS = [  # what the CPU backend is held to: slow, about a quarter of an hour
    *(c for n in (128, 1024, 8192) for c in decode("llama-3-8b", BOTH, 1, n, FP32, FP16, BF16)),
    *decode("llama-3-8b", BOTH, 8, 8192, FP32, FP16, BF16),
    *(c for n in (1024, 4096) for c in prefill("llama-3-8b", BOTH, 1, n, FP32, FP16, BF16)),
    *(c for n in (1024, 4096) for c in prefill("llama-3.2-1b", BOTH, 1, n, FP32, FP16, BF16)),
]

E2E = [  # whole decoders: batches and contexts
    *(c for n in (128, 512, 2048) for c in end_to_end("smollm2-135m", SMOL, 1, n, 8, FP32)),
    *(c for b in (4, 16) for c in end_to_end("smollm2-135m", SMOL, b, 128, 8, FP32)),
]
E2E_GPU = [
    *(c for n in (512, 4096, 16384) for c in end_to_end("llama-3-8b", BOTH, 1, n, 8, BF16)),
    *(c for b in (4, 16) for c in end_to_end("llama-3-8b", BOTH, b, 2048, 8, BF16)),
]

GPU = [
    # The headline first: a session that runs out of time has measured what matters.
    *decode("llama-3-8b", BOTH, 1, 8192),
    *decode("llama-3-8b", BOTH, 32, 8192),
    *prefill("llama-3-8b", BOTH, 1, 16384),
    *prefill("llama-3-8b", BOTH, 4, 2048),
    *backward("llama-3-8b", BOTH, 1, 8192),
    *over_caches("llama-3-8b", (SKEWED,), 32, 8192, "pages16", "dense-int8", "pages16-int8"),
    *end_to_end("llama-3-8b", BOTH, 4, 4096, 8, BF16),
    *prefill("llama-3-8b", BOTH, 1, 8192),
    *prefill("llama-3.2-1b", BOTH, 1, 16384),
    *prefill("gemma-2-9b", ("even", "uneven-2"), 1, 16384),
    *(c for n in (512, 2048, 4096, 32768, 131072) for c in decode("llama-3-8b", BOTH, 1, n)),
    *(c for b in (4, 64) for c in decode("llama-3-8b", BOTH, b, 2048)),
    *decode("llama-3-70b", ("even", "uneven-6", "giant"), 16, 8192),
    *decode("llama-3-8b", (MILD, "giant", "interleaved", "pruned", "tp-3"), 16, 8192),
    *decode("llama-2-7b", ("even", *GROUP_SIZES), 16, 4096),
    *decode("qwen2.5-7b", ("even", "tp-3"), 16, 8192),
    *decode("opt-1.3b", ("uneven-4",), 16, 2048),
    *decode("llama-3-8b", BOTH, 16, 8192, FP16),
    *decode("smollm2-135m", SMOL, 16, 2048),
    *prefill("llama-3-8b", BOTH, 1, 512),
    *prefill("llama-3-8b", ("giant", "interleaved", "pruned"), 4, 2048),
    *prefill("llama-3-8b", BOTH, 4, 2048, FP16),
    *prefill("llama-2-7b", GROUP_SIZES, 4, 2048),
    *prefill("opt-1.3b", ("even", "uneven-4"), 4, 2048),
    *prefill("vit-s", ("uneven-2",), 64, 197),
    *prefill("vit-b", ("even", "uneven-3"), 64, 197),
    *prefill("vit-l", ("uneven-4",), 64, 197),
    *prefill("t5-base", ("even", "uneven-3"), 16, 512),
    *prefill("llama-3-8b", BOTH, 1, 8192, window=1024),
    *backward("llama-3-8b", BOTH, 4, 2048),
    *over_caches(
        "llama-3-8b",
        (SKEWED,),
        32,
        8192,
        "pages64",
        "pages16-budgets",
        "dense-fp8_e4m3",
        "dense-int4",
    ),
]

SUITES: dict[str, list[AnyCase]] = {
    "quick": QUICK,
    "cpu": CPU,
    "cpu-goals": CPU_GOALS,
    "caches": CACHES,
    "e2e": E2E,
    "e2e-gpu": E2E_GPU,
    "scaling": scaling_cases("cpu"),
    "scaling-gpu": scaling_cases("cuda"),
    "gpu": GPU,
}

HEADLINE = "llama-3-8b"  # the model, with the maps of BOTH and what follows, for docs/benchmarks.md
HEADLINE_TYPES = {"prefill": (BF16, FP32)}  # of other ops all
HEADLINE_LENGTHS = {
    "decode": (8192,),
    "prefill": (1024, 2048, 16384),
    "backward": (512, 8192),
    "decode-cache": (8192,),
}
HEADLINE_CACHES = (None, "pages16", "dense-int8", "pages16-int8")
HEADLINE_DECODERS = ("smollm2-135m", "llama-3-8b")


def is_headline(case: dict) -> bool:
    """Whether docs/benchmarks.md shows a case, as rows describe it."""
    if case["op"] in ("first-token", "generate"):
        return case["model"] in HEADLINE_DECODERS
    return (
        case["op"] in HEADLINE_LENGTHS
        and case["model"] == HEADLINE
        and case["map"] in BOTH
        and case["dtype"] in HEADLINE_TYPES.get(case["op"], (BF16, FP32))
        and not case["cold"]
        and case["window"] is None
        and case["kv_len"] in HEADLINE_LENGTHS[case["op"]]
        and case.get("cache") in HEADLINE_CACHES
    )


README_MAP = {HEADLINE: BOTH[1], "smollm2-135m": "4-3-2"}  # uneven maps


def is_in_readme(case: dict) -> bool:
    """Whether the README shows a case: of each op, one on an uneven map."""
    typical = case["op"] in ("first-token", "generate") or (
        case["dtype"] == BF16 and case["batch"] == 1 and case.get("cache") is None
    )
    return is_headline(case) and typical and case["map"] == README_MAP.get(case["model"])
