"""``gqa-kernels serve``: serves a checkpoint folder with transformers' OpenAI server.

``transformers serve`` refuses a converted checkpoint: it knows neither its model class nor our
attention implementation. Here the server loads models with :func:`gqa_kernels.convert.load`.
Everything else is transformers' own code.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .outcome import Outcome

SUMMARY = "serve a checkpoint over HTTP with transformers' OpenAI server"
EXAMPLE = "gqa-kernels serve child --port 8000"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help=SUMMARY,
        description="Options behind the folder are those of `transformers serve`, for example "
        "--continuous-batching and --port. Needs pip install 'gqa-kernels[serve]'.",
    )
    parser.add_argument("model", type=Path, help="a checkpoint folder, converted or not")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of `transformers serve`")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    try:
        import typer
        from transformers.cli.serve import Serve
        from transformers.cli.serving import model_manager
    except ImportError as error:
        raise ImportError(
            f"serve needs transformers with its server (pip install 'gqa-kernels[serve]'): {error}"
        ) from error
    from ..convert.checkpoint import read_config

    # Refuses a folder without a checkpoint, which the server would take for the name of a model.
    read_config(arguments.model)
    server = typer.Typer(add_completion=False)
    server.command()(Serve)
    manager = _manager(model_manager.ModelManager)
    status = 0
    with manager.models, patch.object(model_manager, "ModelManager", manager):
        try:
            server([str(arguments.model), *arguments.options], prog_name="gqa-kernels serve")
        except SystemExit as end:  # the server always ends this way
            status = int(end.code or 0)
    return Outcome({"model": str(arguments.model)}, status)


def _manager(stock: type) -> type:
    """transformers' manager of a server's models, which loads them in our way.

    Its ``models`` keeps state for as long as the server runs.
    """

    class Manager(stock):
        models = ExitStack()

        def __init__(self, *args: Any, continuous_batching: bool = False, **options: Any):
            self.continuous_batching = continuous_batching
            super().__init__(*args, continuous_batching=continuous_batching, **options)

        def _load_model(self, model_id_and_revision: str, *_: Any, **others: Any) -> Any:
            from ..convert import load
            from ..integrations.transformers import continuous_batching, register

            if others.get("gguf_file") or self.quantization or self.attn_implementation:
                raise NotImplementedError(
                    "serve loads checkpoints as they are and on asym_gqa: use it without GGUF "
                    "files, --quantization and --attn-implementation"
                )
            model = load(
                model_id_and_revision, dtype=self.dtype, device_map=self.device,
                attn_implementation=register(),
            )  # fmt: skip
            if self.continuous_batching:
                self.models.enter_context(continuous_batching(model))
            return model

    return Manager
