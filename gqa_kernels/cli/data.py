"""The inputs of commands: models, and batches of text or of ready-made inputs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import SMOLLM2

if TYPE_CHECKING:
    from torch import nn

    from ..models.float_types import FloatTypes


class Loaded(NamedTuple):
    """A model in fp32, its tokenizer (None if it has none), and the types of its checkpoint."""

    model: nn.Module
    tokenizer: Any
    types: FloatTypes


def load_model(name: str, device: str = "cpu") -> Loaded:
    """A model by its command-line name, on a device.

    Raises:
        ValueError: no such device here.
    """
    from ..models.float_types import float_types

    _check_device(device)
    if name == SMOLLM2:
        from ..samples.smollm2 import load_smollm2

        found = load_smollm2()
        return Loaded(found.model.to(device), found.tokenizer, float_types(found.model))
    from transformers import AutoTokenizer

    from ..convert import load

    model = load(name, dtype="auto")
    types = float_types(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # a tokenizer is optional; without one transformers raises any error
        tokenizer = None
    return Loaded(model.float().to(device), tokenizer, types)


def batches(arguments: argparse.Namespace, tokenizer: Any, default: Callable[[], str]) -> list:
    """Batches that the options of ``add_text`` select; ``default`` makes the text without
    ``--text``."""
    size = arguments.batch_size
    if arguments.batches is not None:
        return list(_ready(arguments.batches, size))
    if tokenizer is None:
        raise ValueError("--batches must be given for a model without a tokenizer")
    from ..samples.text import rows

    text = default() if arguments.text is None else _read(arguments.text)
    return list(rows(tokenizer, text, tuple(arguments.shape)).split(size))


def draw(make: Callable[..., Path], *arguments: Any, **options: Any) -> None:
    """Draw a figure next to a result. Without matplotlib, print a warning and continue."""
    try:
        print(f"wrote {make(*arguments, **options)}")
    except ImportError as error:
        print(f"gqa-kernels: no picture: {error}", file=sys.stderr)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that works here, got {device}: {reason}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be a UTF-8 file, got {path}: {error}") from error


def _ready(path: Path, size: int):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"tensors of {path} must have equally many rows, got {sorted(lengths)}")
    for start in range(0, lengths.pop(), size):
        yield {name: tensor[start : start + size] for name, tensor in tensors.items()}
