"""SGLang's own model classes, under the names that the configs of uneven checkpoints contain.

SGLang's attention backends look only at head counts. Only ours reads the maps, so these classes
refuse the others.
"""

from __future__ import annotations

from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.server_args import get_global_server_args

from ....models.maps import guarded_architecture
from ..names import BACKEND

OPTIONS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def refuse_other_backends() -> None:
    """Raise NotImplementedError unless the server computes all attention with our backend."""
    arguments = get_global_server_args()
    asked = {name: getattr(arguments, name, None) for name in OPTIONS}
    others = {name: value for name, value in asked.items() if value not in (None, BACKEND)}
    if others or asked["attention_backend"] is None:
        raise NotImplementedError(
            f"--attention-backend must be {BACKEND} for a model with uneven head maps, got "
            f"{others or 'none'}: other backends would compute equal groups"
        )


def guarded(stock: type) -> type:
    """A model class that first checks the server's attention backend."""

    def make(self, *args, **options):
        refuse_other_backends()
        stock.__init__(self, *args, **options)

    name = guarded_architecture(stock.__name__)
    members = {"__init__": make, "__module__": __name__, "__doc__": f"{stock.__name__}, uneven."}
    return type(name, (stock,), members)


EntryClass = [
    guarded(stock)
    for stock in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
]
