"""evaluate(): how far a converted model is from its parent, on held-out data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from ..attention import asym_gqa_attention
from ..grouping.evaluation import layer_errors
from ..integrations.transformers import attention_call
from ..integrations.transformers.guards import reads_maps
from ..models.families import AttentionLayer, attention_layers
from ..models.inputs import Batch, model_inputs, token_mask
from ..reporting.progress import track

_PROBE = "asym_gqa_probe"


@dataclass(frozen=True)
class Evaluation:
    """A child compared with its parent. Measures that don't apply to a model are None.

    Attributes:
        tokens: predicted tokens (next-token models) or hidden states compared (others).
        perplexity, parent_perplexity: exp of the mean next-token cross entropy.
        kl: mean over tokens of KL(parent || child) of the next-token distributions, nats.
        top1_agreement: share of tokens for which both predict the same next token.
        state_cosine: mean cosine of the last hidden states, of models without next-token logits.
        output_error: per layer the error of the attention output on the parent's inputs
            (``grouping.evaluation.layer_errors``).
        entropy, parent_entropy: per layer the mean entropy of attention, nats, over heads and
            queries; a collapse to uniform attention shows here.
        kv_heads: per layer ``(Hk, Hv)`` of the child.
    """

    tokens: int
    perplexity: float | None
    parent_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    state_cosine: float | None
    output_error: tuple[float, ...]
    entropy: tuple[float, ...]
    parent_entropy: tuple[float, ...]
    kv_heads: tuple[tuple[int, int], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@torch.no_grad()
def evaluate(
    parent: nn.Module, child: nn.Module, batches: Iterable[Batch], *, progress: bool = False
) -> Evaluation:
    """Compare a converted model with the model it was made from.

    Args:
        parent, child: of one family, on one device. Each is measured with the attention
            implementation that it has.
        batches: as in ``calibrate``.
        progress: show a bar if standard error is a terminal.

    Raises:
        ValueError: no tokens, or models of different depth.

    Examples:
        >>> print(evaluate(model, child, held_out).to_json())
    """
    layers, own = attention_layers(parent), attention_layers(child)
    if len(layers) != len(own):
        raise ValueError(
            f"child must have as many attention layers as parent ({len(layers)}), got {len(own)}"
        )
    sums = {"loss": 0.0, "parent_loss": 0.0, "kl": 0.0, "same": 0, "cosine": 0.0}
    tokens, causal = 0, predicts_next_token(parent)
    entropies = [_Entropy(parent), _Entropy(child)]
    batches = [model_inputs(parent, batch) for batch in batches]
    for batch in track(batches, "Evaluating", shown=progress):
        with entropies[0].measured(batch):
            theirs = run(parent, batch)
        with entropies[1].measured(batch):
            ours = run(child, batch)
        if causal:
            tokens += _compare_logits(sums, theirs.logits, ours.logits, batch)
        else:
            tokens += _compare_states(sums, hidden_states(theirs), hidden_states(ours), batch)
    if not tokens:
        raise ValueError("batches must hold at least one token to compare, got none")
    return Evaluation(
        tokens=tokens,
        perplexity=math.exp(sums["loss"] / tokens) if causal else None,
        parent_perplexity=math.exp(sums["parent_loss"] / tokens) if causal else None,
        kl=sums["kl"] / tokens if causal else None,
        top1_agreement=sums["same"] / tokens if causal else None,
        state_cosine=None if causal else sums["cosine"] / tokens,
        output_error=tuple(layer_errors(parent, child, batches)),
        entropy=entropies[1].means(),
        parent_entropy=entropies[0].means(),
        kv_heads=tuple((layer.heads.key, layer.heads.value) for layer in own),
    )


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch], *, progress: bool = False) -> float:
    """exp of the mean next-token cross entropy over tokens that are not padding."""
    loss, tokens = 0.0, 0
    for batch in track(batches, "Perplexity", shown=progress):
        inputs = model_inputs(model, batch)
        count, value = next_token_loss(run(model, inputs).logits, inputs)
        loss, tokens = loss + float(value), tokens + count
    if not tokens:
        raise ValueError("batches must hold at least two tokens in a row, got none")
    return math.exp(loss / tokens)


def next_token_loss(logits: Tensor, inputs: dict[str, Tensor]) -> tuple[int, Tensor]:
    """The number of predicted tokens, and the sum of their cross entropies, without padding.

    Args:
        logits: ``[B, S, V]``; each position predicts the token after it.
    """
    kept, target = _predicted(inputs)
    return int(kept.sum()), cross_entropy(
        logits[:, :-1][kept].float(), target[kept], reduction="sum"
    )


def predicts_next_token(model: nn.Module) -> bool:
    """True for causal language models, with their head."""
    return model.get_output_embeddings() is not None and all(
        _is_causal(layer) for layer in attention_layers(model)
    )


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The model's output object, without a cache."""
    return model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))


def hidden_states(output: Any) -> Tensor:
    """Last hidden states ``[B, S, d]``, or the logits of a model with another head."""
    for name in ("last_hidden_state", "logits"):
        found = getattr(output, name, None)
        if found is not None and found.dim() == 3:
            return found
    raise NotImplementedError(
        "a model without last_hidden_state can't be compared: give the model below its head "
        f"(model.base_model), got an output with {', '.join(output.keys())}"
    )


def padding_mask(inputs: dict[str, Tensor]) -> str:
    """The name of the mask of the model's output tokens, for ``token_mask``."""
    return "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"


def _predicted(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which positions predict a token, ``[B, S - 1]``, and the tokens they predict."""
    ids = inputs["input_ids"]
    mask = token_mask(inputs, "attention_mask", ids)
    return mask[:, 1:] & mask[:, :-1], ids[:, 1:]


def _compare_logits(sums: dict, parent: Tensor, child: Tensor, inputs: dict) -> int:
    for name, logits in (("parent_loss", parent), ("loss", child)):
        sums[name] += float(next_token_loss(logits, inputs)[1])
    kept, _ = _predicted(inputs)
    theirs, ours = (logits[:, :-1][kept].float().log_softmax(-1) for logits in (parent, child))
    sums["kl"] += float(kl_div(ours, theirs, reduction="sum", log_target=True))
    sums["same"] += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return len(ours)


def _compare_states(sums: dict, parent: Tensor, child: Tensor, inputs: dict) -> int:
    mask = token_mask(inputs, padding_mask(inputs), parent)
    cosine = cosine_similarity(parent[mask].float(), child[mask].float(), dim=-1)
    sums["cosine"] += float(cosine.sum())
    return len(cosine)


def _is_causal(layer: AttentionLayer) -> bool:
    return bool(getattr(layer.module, "is_causal", True))


class _Entropy:
    """Mean entropy of attention by layer, measured inside a model's own attention calls."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.index = {id(layer.module): layer.index for layer in attention_layers(model)}
        self.masks = [layer.stack.mask for layer in attention_layers(model)]
        self.sums = [0.0] * len(self.index)
        self.counts = [0] * len(self.index)

    @contextmanager
    def measured(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Run the model inside, on these inputs, through an attention that also takes entropies."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        def attention(module, query, key, value, attention_mask, **options):
            call = attention_call(module, query, key, value, attention_mask, **options)
            self._add(self.index[id(module)], call, inputs)
            return asym_gqa_attention(**call), None

        AttentionInterface.register(_PROBE, reads_maps(attention))
        AttentionMaskInterface.register(_PROBE, sdpa_mask)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(_PROBE)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def means(self) -> tuple[float, ...]:
        return tuple(s / n for s, n in zip(self.sums, self.counts, strict=True))

    def _add(self, layer: int, call: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        """Entropies of one call: with the identity for V, attention returns its probabilities."""
        q, k = call["q"], call["k"]
        keys = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
        p = asym_gqa_attention(
            **{
                **call,
                "v": keys[None, :, None].expand(len(k), -1, -1, -1),
                "value_head_map": [0] * q.shape[2],
            },
            backend="reference",
        ).float()  # [B, Sq, Hq, Sk]
        mask = token_mask(inputs, self.masks[layer], q)
        entropy = torch.special.entr(p).sum(-1)[mask]
        self.sums[layer] += float(entropy.sum())
        self.counts[layer] += entropy.numel()
