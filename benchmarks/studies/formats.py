"""SmolLM2-135M over a quantised KV cache: bytes per token against quality, for every format.

    python -m benchmarks.studies.formats --save

A context fills a cache; then the tokens after it come at once and attend to it, and to themselves,
as the format has stored them. Rows have the bytes that a token takes in all layers (K, V and
scales), the perplexity of those tokens, and the Kullback-Leibler divergence of the predictions
from those over the exact cache, in nats per token. ``hadamard``: keys are stored rotated. The table
is written beside the JSON file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels.reporting.files import write_atomically

from ..report.results import FOLDER, Results, header

PATH = FOLDER / "formats" / "smollm2.json"
FORMATS = (  # format, zeros, hadamard
    (None, False, False),
    ("fp8_e4m3", False, False),
    ("fp8_e5m2", False, False),
    ("int8", False, False),
    ("int8", False, True),
    ("k8v4", False, False),
    ("k8v4", True, False),
    ("int4", False, False),
    ("int4", True, False),
    ("int4", False, True),
    ("int4", True, True),
)


def name_of(format: str | None, zeros: bool, hadamard: bool) -> str:
    """A format in words."""
    words = [format or "exact", *(["zeros"] if zeros else []), *(["hadamard"] if hadamard else [])]
    return ", ".join(words)


@torch.inference_mode()
def predictions(model: nn.Module, ids: Tensor, context: int, cache: Any) -> Tensor:
    """Log-probabilities ``[n, V]`` of the token after each of ``ids [1, context + n + 1]`` that
    come behind the context but the last."""
    model.model(input_ids=ids[:, :context], past_key_values=cache)
    logits = model(input_ids=ids[:, context:-1], past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)


def run(model: nn.Module, texts: Tensor, context: int) -> list[dict]:
    """A row for each of ``FORMATS``, the exact one first.

    Args:
        texts: ``[count, context + n + 1]``: ``n`` tokens of each give the quality.
    """
    from gqa_kernels.integrations.transformers import PagedCache

    sums = {format: {"loss": 0.0, "divergence": 0.0, "agrees": 0} for format in FORMATS}
    bytes_per_token = {}
    for ids in texts.split(1):
        exact = None
        expected = ids[0, context + 1 :]
        for format in FORMATS:
            stored = dict(zip(("format", "zeros", "hadamard"), format, strict=True))
            cache = PagedCache(model.config, **stored)
            found = predictions(model, ids, context, cache)
            exact = found if exact is None else exact
            one = sums[format]
            one["loss"] += float(nn.functional.nll_loss(found, expected, reduction="sum"))
            one["divergence"] += float((exact.exp() * (exact - found)).sum())
            one["agrees"] += int((exact.argmax(-1) == found.argmax(-1)).sum())
            bytes_per_token[format] = sum(map(_slot_bytes, cache.layers))
    count = len(texts) * (texts.shape[1] - context - 1)
    return [
        {
            "key": name_of(*format),
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": context,
            "tokens": count,
            "bytes_per_token": bytes_per_token[format],
            "perplexity": float(torch.tensor(one["loss"] / count).exp()),
            "divergence": one["divergence"] / count,
            "same_choice": one["agrees"] / count,
        }
        for format, one in sums.items()
    ]


def _slot_bytes(layer: Any) -> int:
    """Bytes of one slot of a layer's pages, of all heads, with its scales and zeros."""
    pool = layer.pool
    held = (pool.k, pool.v, *pool.scales.values())
    slots = pool.k.shape[0] * pool.k.shape[2]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor)) // slots


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    exact = rows[0]
    lines = [
        f"SmolLM2-135M in {exact['dtype']}, {exact['tokens']} tokens behind contexts of "
        f"{exact['context']}. Made by `python -m benchmarks.studies.formats --save`.",
        "",
        "| K and V | bytes per token | perplexity | KL from exact | same first choice |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['key']} | {row['bytes_per_token']:,} "
        f"({row['bytes_per_token'] / exact['bytes_per_token']:.2f}x) | {row['perplexity']:.2f} | "
        f"{row['divergence']:.5f} | {row['same_choice']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="behind each context")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--path", type=Path, default=PATH)
    parser.add_argument("--save", action="store_true", help="write the file and the table")
    options = parser.parse_args(arguments)

    from gqa_kernels.integrations.transformers import register
    from gqa_kernels.models.fingerprint import fingerprint
    from gqa_kernels.samples.smollm2 import load_smollm2
    from gqa_kernels.samples.text import evaluation_text
    from gqa_kernels.samples.text import rows as token_rows

    loaded = load_smollm2()
    model = loaded.model.to(getattr(torch, options.dtype))
    shape = (options.texts, options.context + options.tokens + 1)
    texts = token_rows(loaded.tokenizer, evaluation_text(), shape)
    model.set_attn_implementation(register("asym_gqa_stored", backend=options.backend))
    rows = run(model, texts, options.context)
    print(table(rows))
    if options.save:
        made_from = fingerprint(model, [texts], context=options.context)
        available = {row["key"]: "available" for row in rows}
        results = Results(header(torch.device("cpu"), "formats", available, made_from))
        results.add(rows)
        results.save(options.path)
        write_atomically(options.path.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
