"""The whole demo, from loading the model to the report."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

from ..attention import asym_gqa_attention
from ..head_map import HeadMap
from ..integrations.transformers import register
from ..reporting.errors import UsageError
from ..reporting.steps import Steps
from ..samples.smollm2 import LoadedModel
from ..samples.text import evaluation_text, rows
from . import lossless, lossy
from .baseline import EXPAND, Comparison, compare, register_baseline
from .measure import Speed, speeds
from .report import Report
from .settings import Settings


def run(settings: Settings, load: Callable[[], LoadedModel], console: Console) -> Report:
    """Run every part on the model that ``load`` returns."""
    started, cpu_started = time.perf_counter(), time.process_time()
    steps = Steps(console)
    device = _device(settings)
    with steps.step("Preparing kernels (some are compiled at first use)"):
        _prepare(settings.backend, device)
    register(backend=settings.backend)
    register_baseline()
    loading = time.perf_counter()
    with steps.step("Loading the model"):
        loaded = load()
        loaded.model.to(device)
    load_seconds = time.perf_counter() - loading
    split, lossless_part = lossless.run(loaded, settings, steps)
    comparison = lossless_part.comparison
    dtype = getattr(torch, settings.dtype)
    if dtype != torch.float32:
        loaded.model.to(dtype)
        split.to(dtype)
        comparison = _compare_again(split, loaded, settings, steps)
    timed = _time(split, loaded, settings, steps)
    del split
    return Report(
        settings=settings,
        loaded=loaded,
        load_seconds=load_seconds,
        lossless=lossless_part,
        comparison=comparison,
        speed=timed,
        merged=lossy.run(loaded, settings, steps),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def _device(settings: Settings) -> str:
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise UsageError("--device must be cpu if torch finds no GPU, got cuda")
    return ("cuda" if found else "cpu") if settings.device == "auto" else settings.device


def _prepare(backend: str, device: str) -> None:
    """Make a first call, so that no timing includes a compilation."""
    try:
        asym_gqa_attention(
            *torch.zeros(3, 1, 2, 4, 16, device=device), HeadMap([1, 0]), backend=backend
        )
    except NotImplementedError as error:
        raise UsageError(str(error)) from None


def _compare_again(
    split: nn.Module, loaded: LoadedModel, settings: Settings, steps: Steps
) -> Comparison:
    ids = rows(loaded.tokenizer, evaluation_text(), (1, 64)).to(split.device)
    with steps.step(f"Comparing attention with expand + SDPA in {settings.dtype}"):
        return compare(split, ids, 8, settings.backend)


def _time(
    split: nn.Module, loaded: LoadedModel, settings: Settings, steps: Steps
) -> dict[str, Speed]:
    ids = rows(loaded.tokenizer, evaluation_text(), (1, settings.context)).to(split.device)
    variants = {
        "stock: SDPA": (loaded.model, "sdpa"),
        "split: expand + SDPA": (split, EXPAND),
        "split: asym_gqa": (split, "asym_gqa"),
    }
    total = len(variants) * (settings.repeats + 1)
    with steps.step(f"Timing prefill of {settings.context} tokens and decode", total) as advance:
        return speeds(variants, ids, settings.decode_steps, settings.repeats, advance)
