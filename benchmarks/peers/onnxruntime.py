"""onnxruntime's operator ``GroupQueryAttention`` on the CPU, in a model of that one operator."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..data.cases import Case
from .base import Inputs, Prepared, StoringPeer

INPUTS = (  # in the operator's order; an empty name: not used
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
    "", "", "", "", "", "k_scale", "v_scale",
)  # fmt: skip
INT8_LARGEST = 127


class OnnxruntimePeer(StoringPeer):
    name = "onnxruntime"
    summary = (
        "onnxruntime's GroupQueryAttention, K and V in its cache but for the query's own tokens, "
        "which it appends in place; int8 with a scale per channel; equal, contiguous groups only"
    )

    def unavailable_reason(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "compared on CPUs only"
        missing = [n for n in ("onnxruntime", "onnx") if importlib.util.find_spec(n) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def refusal(self, case: Case) -> str | None:
        kind = case.cache_kind
        if case.dtype not in ("float32", "float16"):
            return f"no {case.dtype} on CPUs"
        if case.relative_bias:
            return "no additive mask"
        if case.batch > 1 and 1 < case.q_len < case.kv_len:
            return "a batch can't append several tokens to a cache"
        if kind.page_size:
            return "no pages on CPUs"
        if kind.format not in (None, "int8"):
            return f"no {kind.format} cache"
        if kind.format and case.dtype != "float32":
            return "an int8 cache is compared with float32 queries only"
        return None

    def store(self, case: Case, inputs: list[Inputs]) -> Prepared:
        stored: list[tuple[Tensor, Tensor]] = []
        bindings = [_Binding(case, *one, stored) for one in inputs]
        shape = (case.batch, case.q_len, case.head_map.num_heads, case.head_dim)
        return Prepared(
            lambda copy: bindings[copy].run(),
            lambda out: out.view(shape).transpose(1, 2),
            stored=stored[0] if stored else None,
        )


class _Binding:
    """The operator with one copy's tensors bound to it: q ``[B, Hq, Sq, D]``, k and v
    ``[B, Hkv, Sk, D]``. The dequantised values of a quantised cache are appended to ``stored``."""

    def __init__(
        self, case: Case, q: Tensor, k: Tensor, v: Tensor, stored: list[tuple[Tensor, Tensor]]
    ):
        new = [x[:, :, -case.q_len :].transpose(1, 2).flatten(2).contiguous() for x in (q, k, v)]
        self.inputs = dict(zip(INPUTS, new, strict=False))
        attributes: dict[str, Any] = {
            "num_heads": case.head_map.num_heads,
            "kv_num_heads": case.head_map.num_kv_heads,
            "causal": int(case.causal or case.q_len == 1),
        }
        if case.window is not None:  # it counts the query's own token
            attributes["local_window_size"] = case.window + 1
        present = [x.clone() for x in (k, v)]
        if case.cache_kind.format:
            scales = [x.abs().amax(dim=(0, 2), keepdim=True) / INT8_LARGEST for x in (k, v)]
            present = [(x / s).round().to(torch.int8) for x, s in zip((k, v), scales, strict=True)]
            values = [x.float() * s for x, s in zip(present, scales, strict=True)]
            stored.append((values[0], values[1]))
            self.inputs |= {"k_scale": scales[0], "v_scale": scales[1]}
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL"}
            attributes["v_quant_type"] = "PER_CHANNEL"
        if case.q_len < case.kv_len:  # else all tokens are the prompt's, and the cache is empty
            self.inputs |= {"past_key": present[0], "past_value": present[1]}
        self.inputs["seqlens_k"] = torch.full((case.batch,), case.kv_len - 1, dtype=torch.int32)
        self.inputs["total_sequence_length"] = torch.tensor([case.kv_len], dtype=torch.int32)
        self.out = torch.empty_like(new[0])
        self.outputs = {
            "output": self.out, "present_key": present[0], "present_value": present[1]
        }  # fmt: skip
        self.session = _session(self.inputs, self.outputs, attributes)
        self.binding = self.session.io_binding()
        for name, tensor in self.inputs.items():
            self.binding.bind_input(name, *_place(tensor))
        for name, tensor in self.outputs.items():
            self.binding.bind_output(name, *_place(tensor))

    def run(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return self.out


def _place(tensor: Tensor) -> tuple:
    """Device, its index, type, shape and address, as bindings take them."""
    dtype = tensor.new_empty(0).numpy().dtype
    return "cpu", 0, dtype, list(tensor.shape), tensor.data_ptr()


def _session(inputs: dict[str, Tensor], outputs: dict[str, Tensor], attributes: dict) -> Any:
    """A session of the model that is the one operator."""
    import onnxruntime
    from onnx import helper

    def described(tensors: dict[str, Tensor]) -> list:
        return [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(x.new_empty(0).numpy().dtype), list(x.shape)
            )
            for name, x in tensors.items()
        ]

    names = [name if name in inputs else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes
    )
    graph = helper.make_graph([node], "attention", described(inputs), described(outputs))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # Its threads spin after a call: without this they would slow the contestant that comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
