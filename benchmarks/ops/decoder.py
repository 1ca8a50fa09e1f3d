"""End to end: a decoder with random weights, run by transformers, with the map in every layer.

The model is a LLaMA of the shape that the case names, trained with as many KV heads as query heads
as far as the shapes go, then converted by averaging KV heads over the map's groups. Its twin with
the KV heads copied out again to all query heads is the same function, and costs what the model cost
before the conversion.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels import HeadMap
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_close

from ..data.cases import Case
from ..peers.base import BackendContestant, Contestant, Prepared
from ..peers.torch import SDPA_STORAGE, UNEVEN

CHECKED_TOKENS, CHECKED_STEPS = 24, 3  # of the gate: prompt, then single steps


@dataclass(frozen=True)
class Architecture:
    """What ``cases.MODELS`` leaves open of a decoder."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


ARCHITECTURES = {
    "smollm2-135m": Architecture(30, 576, 1536, 49152),
    "smollm2-4-layers": Architecture(4, 576, 1536, 49152),
    "llama-3-8b": Architecture(32, 4096, 14336, 128256),
}


@dataclass(frozen=True)
class Decoder:
    """The models of a case.

    Attributes:
        model: with the case's map in every layer.
        ids: prompt ``[B, prompt tokens]``; one copy, whatever the device.
    """

    case: Case
    model: nn.Module
    ids: Tensor
    copies: tuple[int, ...] = field(default=(0,))

    @classmethod
    def build(
        cls, case: Case, device: torch.device, architecture: Architecture | None = None
    ) -> Decoder:
        from gqa_kernels.convert import convert

        architecture = architecture or ARCHITECTURES[case.model]
        torch.manual_seed(0)
        with device:
            model = _llama(case, architecture)
        model = convert(model, [case.head_map] * architecture.num_layers, merging="mean")
        shape = (case.batch, case.kv_len)
        ids = torch.randint(architecture.vocab_size, shape, device=device)
        return cls(case, model, ids)

    @property
    def head_map(self) -> HeadMap:
        return self.case.head_map

    @cached_property
    def twin(self) -> nn.Module:
        """The same function with a KV head per query head."""
        from gqa_kernels.convert import convert

        heads = self.head_map.num_heads
        layers = self.model.config.num_hidden_layers
        return convert(self.model, [HeadMap.uniform(heads, heads)] * layers, merging="none")


def with_attention(model: nn.Module, implementation: str) -> nn.Module:
    """The model on another attention: the same weights, a config of its own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(implementation)
    return other


class DecoderGate:
    """Holds logits of a short prompt and of single steps after it to the tolerance rule.

    Exact is the model in a higher precision on the package's reference; eager is the twin on
    transformers' own eager attention.
    """

    def __init__(self, problem: Decoder):
        from gqa_kernels.integrations.transformers import register

        exact = torch.float64 if problem.case.torch_dtype == torch.float32 else torch.float32
        model = copy.deepcopy(problem.model).to(exact)
        model.set_attn_implementation(register("asym_gqa_exact", backend="reference"))
        self.exact = forced_logits(model, problem.ids).double()
        del model  # room for the twin
        self.eager = forced_logits(with_attention(problem.twin, "eager"), problem.ids)

    def check(self, logits: Tensor) -> None:
        assert_close("logits", logits, self.exact, [self.eager])


@torch.inference_mode()
def forced_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``[B, n, V]`` of the first tokens of a prompt, the last of them fed one by one."""
    ids = ids[:, : CHECKED_TOKENS + CHECKED_STEPS]
    out = model(ids[:, :-CHECKED_STEPS], use_cache=True)
    logits = [out.logits]
    for token in ids[:, -CHECKED_STEPS:].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _prepared(problem: Decoder, model: nn.Module) -> Prepared:
    """Runs ``generate``: the case's new tokens after a cached prompt, or the first token after a
    prompt that is not cached."""
    case = problem.case
    new_tokens = 1 if case.op == "first-token" else case.q_len
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(problem.ids), "do_sample": False,
        "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0,
    }  # fmt: skip
    cache = None
    if case.op == "generate":
        with torch.inference_mode():
            cache = model(problem.ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def run(copy: int) -> Tensor:
        if cache is not None:
            if surplus := cache.get_seq_length() - (case.kv_len - 1):
                cache.crop(-surplus)
            return model.generate(problem.ids, past_key_values=cache, **options)
        return model.generate(problem.ids, **options)

    config = model.config
    kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return Prepared(
        run,
        lambda _: forced_logits(model, problem.ids),
        lambda _: {"kv_bytes_per_token": kv_elements * case.torch_dtype.itemsize},
    )


class DecoderBackend(BackendContestant):
    """``attn_implementation="asym_gqa"`` with one backend."""

    def __init__(self, name: str):
        super().__init__(name)
        self.summary = f'transformers with attn_implementation="asym_gqa", backend {name}'

    def unavailable_reason(self, device: torch.device) -> str | None:
        return transformers_missing() or super().unavailable_reason(device)

    def unsupported_reason(self, problem: Decoder) -> str | None:
        return None

    def prepare(self, problem: Decoder) -> Prepared:
        from gqa_kernels.integrations.transformers import register

        implementation = register(f"asym_gqa_{self.backend}", backend=self.backend)
        return _prepared(problem, with_attention(problem.model, implementation))

    def control(self) -> None:
        return None


class DecoderPeer(Contestant):
    """transformers' SDPA, by how the cache is kept: see ``peers.SDPA_STORAGE``."""

    def __init__(self, storage: str):
        self.name = storage
        self.summary = f"transformers: {SDPA_STORAGE[storage]}"

    def unavailable_reason(self, device: torch.device) -> str | None:
        return transformers_missing()

    def unsupported_reason(self, problem: Decoder) -> str | None:
        if self.name == "gqa-sdpa" and not problem.head_map.is_uniform:
            return UNEVEN
        return None

    def prepare(self, problem: Decoder) -> Prepared:
        from gqa_kernels.demo.baseline import EXPAND, register_baseline

        register_baseline()
        model = problem.twin if self.name == "expanded-sdpa" else problem.model
        implementation = EXPAND if self.name == "expand+sdpa" else "sdpa"
        return _prepared(problem, with_attention(model, implementation))


def decoder_backends() -> dict[str, Contestant]:
    return {name: DecoderBackend(name) for name in BACKENDS}


def decoder_peers() -> dict[str, Contestant]:
    return {name: DecoderPeer(name) for name in SDPA_STORAGE}


def transformers_missing() -> str | None:
    return None if find_spec("transformers") else "transformers is not installed"


def _llama(case: Case, architecture: Architecture) -> nn.Module:
    """Random weights, a KV head per query head; query heads as the map has them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = case.head_map.num_heads
    config = LlamaConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.kv_len + case.q_len,
        dtype=case.torch_dtype,
    )
    return AutoModelForCausalLM.from_config(config).to(case.torch_dtype).eval()
