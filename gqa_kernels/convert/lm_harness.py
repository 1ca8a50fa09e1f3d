"""run_tasks(): EleutherAI's lm-evaluation-harness on a model in memory.

Tasks download their data, generate it (``ruler_fwe`` and others of lm-eval, with the model's
tokenizer), or are local: YAML files in a folder that name local data (``dataset_path: json``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

OLDEST = "0.4.13"  # first release tested


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    include_defaults: bool = True,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Results by task, as ``lm_eval.simple_evaluate`` returns them.

    Args:
        model: a causal language model of transformers, converted or not, set to the attention
            implementation to measure it with.
        tokenizer: its tokenizer, of transformers.
        tasks: names.
        include_path: folder of task files.
        include_defaults: also look for the harness's own tasks (indexing them takes seconds).
        limit: examples of each task, None for all.
        num_fewshot, batch_size: of the harness.

    Raises:
        ImportError: lm-eval is not installed, or too old.
        ValueError: a task that the harness doesn't know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"run_tasks needs lm-eval >= {OLDEST} (pip install 'lm-eval>={OLDEST}'): {error}"
        ) from error
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # tasks that generate their data load it by name
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            include_defaults=include_defaults,
            metadata={"tokenizer": folder},
        )
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ValueError(f"tasks must be known to lm-eval, got {', '.join(unknown)}")
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    return found["results"]
