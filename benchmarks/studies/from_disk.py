"""Minutes and memory of a conversion from disk to disk, on random weights in LLaMA-2-7B's shapes.

    python -m benchmarks.studies.from_disk write /tmp/parent --layers 32      # 13.5 GB
    /usr/bin/time -v python -m benchmarks.studies.from_disk convert /tmp/parent /tmp/child

``write`` makes the checkpoint: bf16, a shard for each layer. ``convert`` searches ``--kv-heads`` K
and V heads of each layer by measured losses, merges and saves. Every ten seconds it prints the
resident memory: all of it, what belongs to mapped files, and the most so far. Random heads have
nothing in common, so the errors say nothing about a trained model; the work is the same.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from gqa_kernels.convert.streaming import convert_from_disk

WIDTH, INNER, VOCABULARY, HEADS = 4096, 11008, 32000, 32
LENGTH = 512
GIB = 2**30


def write(folder: Path, layers: int) -> None:
    """A checkpoint of random weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(0)
    places = {}

    def random(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    def shard(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    folder.mkdir(parents=True)
    one = torch.ones(WIDTH, dtype=torch.bfloat16)
    rest = {
        "model.embed_tokens.weight": random(VOCABULARY, WIDTH),
        "lm_head.weight": random(VOCABULARY, WIDTH),
        "model.norm.weight": one,
    }
    shard("model-rest.safetensors", rest)
    for layer in range(layers):
        each = {f"self_attn.{name}_proj": random(WIDTH, WIDTH) for name in "qkvo"}
        each |= {f"mlp.{name}_proj": random(INNER, WIDTH) for name in ("gate", "up")}
        each["mlp.down_proj"] = random(WIDTH, INNER)
        each |= {f"{name}_layernorm": one.clone() for name in ("input", "post_attention")}
        named = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in each.items()}
        shard(f"model-{layer:02}.safetensors", named)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)


def convert(folder: Path, out: Path, kv_heads: int, texts: int, held_out: int) -> None:
    """The conversion, with ``texts`` rows of tokens for calibration and ``held_out`` tokens to
    measure losses on."""
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(VOCABULARY, (texts, LENGTH), generator=generator)
    others = torch.randint(VOCABULARY, (1, held_out), generator=generator)
    begin = time.perf_counter()
    watch(begin)
    found = convert_from_disk(
        folder, out, calibration.split(1), [others], num_kv_heads=kv_heads, queries=held_out,
        work=out.with_name(f"{out.name}.work"), progress=True,
    )  # fmt: skip
    print("errors:", *(f"{layer.error:.3f}" for layer in found.layers))
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes, {memory()}")


def memory() -> str:
    """Resident memory of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines if words[-1] == "kB"}
    names = {"now": "VmRSS:", "mapped files": "RssFile:", "most": "VmHWM:"}
    return ", ".join(f"{name} {1024 * kib[key] / GIB:.2f} GiB" for name, key in names.items())


def watch(begin: float, seconds: float = 10.0) -> None:
    """Print the resident memory from time to time, until the process ends."""

    def run() -> None:
        while True:
            print(f"{time.perf_counter() - begin:.0f} s: {memory()}", flush=True)
            time.sleep(seconds)

    threading.Thread(target=run, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--layers", type=int, default=32)
    converting = commands.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("--kv-heads", type=int, default=8)
    converting.add_argument("--texts", type=int, default=2, help="calibration rows of 512 tokens")
    converting.add_argument("--held-out", type=int, default=128, help="tokens")
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.folder, arguments.layers)
    else:
        convert(
            arguments.folder, arguments.out, arguments.kv_heads, arguments.texts, arguments.held_out
        )


if __name__ == "__main__":
    main()
