"""``gqa-kernels eval``: compare a converted model with its parent."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .arguments import add_device, add_model, add_text, count
from .data import batches, draw, load_model
from .outcome import Outcome

SUMMARY = "perplexity, KL, agreement, entropy and errors of a converted model"
EXAMPLE = "gqa-kernels eval smollm2 child --out report"


def add(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval",
        help=SUMMARY,
        description="Writes eval.json and pictures of the layers' errors and entropies; with "
        "--tasks also tasks.json.",
    )
    add_model(parser, "parent", "the model it was made from")
    add_model(parser, "child", "the converted model")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", nargs="+", default=(), help="lm-eval tasks to run on the child")
    parser.add_argument("--include-path", type=Path, help="folder of lm-eval task files")
    parser.add_argument("--limit", type=count, help="examples of each task")
    add_device(parser)
    add_text(parser, "held-out text", (4, 512))
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> Outcome:
    from ..convert.evaluation import evaluate
    from ..convert.lm_harness import run_tasks
    from ..integrations.transformers import register
    from ..reporting import plots
    from ..reporting.files import check_output_folder, write_atomically
    from ..samples.text import evaluation_text

    register()
    out = check_output_folder("--out", arguments.out)
    parent, tokenizer, _ = load_model(arguments.parent, arguments.device)
    child, own_tokenizer, _ = load_model(arguments.child, arguments.device)
    tokenizer = own_tokenizer or tokenizer
    data = batches(arguments, tokenizer, evaluation_text)
    found = evaluate(parent, child, data, progress=True)
    for name in ("perplexity", "parent_perplexity", "kl", "top1_agreement", "state_cosine"):
        if getattr(found, name) is not None:
            print(f"{name} {getattr(found, name):.6g}")
    print(f"wrote {write_atomically(out / 'eval.json', found.to_json())}")
    draw(
        plots.layers,
        {"attention output": found.output_error},
        "held-out error",
        out / "errors.png",
    )
    draw(
        plots.layers,
        {"parent": found.parent_entropy, "child": found.entropy},
        "entropy of attention (nats)",
        out / "entropy.png",
    )
    results = None
    if arguments.tasks:
        results = run_tasks(
            child,
            tokenizer,
            arguments.tasks,
            include_path=arguments.include_path,
            limit=arguments.limit,
        )
        print(f"wrote {write_atomically(out / 'tasks.json', json.dumps(results, indent=1))}")
    return Outcome({**json.loads(found.to_json()), "tasks": results})
