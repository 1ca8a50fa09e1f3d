"""A whole model in vLLM, ours beside vLLM's own attention: results of ``vllm_throughput``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .results import Results, Row
from .tables import provenance

ABOUT = (
    "All requests are sent at once. Texts differ after near-ties, which rounding decides. So each "
    "token is compared with the choice of the stock model in fp32 after the same prefix; the last "
    "column is the largest distance between their logits."
)
FILE = Path("generate") / "vllm.json"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "quartiles": lambda row: f"{row['low']:.0f} to {row['high']:.0f}",
    "KV memory of a token": lambda row: f"{row['kv_bytes_per_token']:,.0f} bytes",
    "texts as vLLM's own": lambda row: f"{row['requests_as_stock']} of {row['requests']}",
    "tokens as fp32 chooses": lambda row: f"{row['tokens_as_fp32']} of {row['tokens']}",
    "furthest below": lambda row: f"{row['furthest_below']:.2f}",
}


def load(folder: Path) -> Results | None:
    """What was measured, None if nothing was."""
    path = folder / FILE
    return Results.load(path) if path.exists() else None


def table(results: Results) -> str:
    """Every contestant, and how its texts compare."""
    head = ["SmolLM2-135M in vLLM", *COLUMNS]
    lines = [head, ["---", *["---:"] * len(COLUMNS)]]
    for row in results.rows:
        name = f"{row['contestant']}, {row['dtype']}, {_requests(row)}"
        lines.append([name, *(cell(row) for cell in COLUMNS.values())])
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join(["### In vLLM", "", provenance(results.header), "", ABOUT, "", *rows])


def line(results: Results) -> str:
    """The first table row of each contestant, in a sentence."""
    first = results.rows[0]
    rows = [row for row in results.rows if row["dtype"] == first["dtype"]]
    speeds = "; ".join(f"{row['contestant']} {row['tokens_per_second']:.0f}" for row in rows)
    return f"- SmolLM2-135M in vLLM, {first['dtype']}, {_requests(first)}, tokens/s: {speeds}."


def _requests(row: Row) -> str:
    return f"{row['requests']} requests of {row['prompt']} + {row['new']} tokens"
