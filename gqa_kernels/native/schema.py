"""The arguments of the ops: each list is written here, once.

A :class:`Schema` defines an op, names the arguments for its fake kernel and its autograd, and
collects the arguments of a call. ``csrc/host`` has the same lists, in the same order, once for all
devices.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "gqa_kernels::"


class Schema:
    """The arguments of one family of ops.

    Attributes:
        text: the schema in torch's notation, without the op's name.
        names: the arguments' names, in order.
        tensors: the names of those that are tensors.
        defaults: the default values of the last arguments.
        Arguments: a named tuple of them. Arguments with a default may be omitted at the end.
    """

    def __init__(self, arguments: str, returns: str, paths: dict[str, str] | None = None):
        """``paths``: the attribute of a call that holds an argument, if it has another name."""
        parts = [part.strip() for part in arguments.split(",")]
        declared = [part.partition("=")[0].split(" ") for part in parts]
        self.text = f"({', '.join(parts)}) -> {returns}"
        self.names = tuple(name for _, name in declared)
        self.tensors = tuple(name for kind, name in declared if kind.startswith("Tensor"))
        self._paths = [(paths or {}).get(name, name) for name in self.names]
        self.defaults = tuple(_DEFAULTS[part.partition("=")[2]] for part in parts if "=" in part)
        self.Arguments = _named_tuple(self.names, self.defaults)
        #: ``arguments_of(call)``: a call's arguments, in order.
        self.arguments_of: Callable[[Any], tuple] = _tuple_of(self._paths)

    def runner_like(self, call: Any, **paths: str) -> Callable[[Callable[..., Any], Any], Any]:
        """``runner(op, call)`` calls an op of this schema with a call's arguments. It serves calls
        that have the same tensors as ``call`` and differ from the defaults in the same numbers. It
        omits the other arguments, because passing an argument takes time.

        Args:
            paths: the attribute of a call that holds an argument, if a faster one than usual
                exists.
        """
        path_of = {**dict(zip(self.names, self._paths, strict=True)), **paths}
        required = self.names[: len(self.names) - len(self.defaults)]
        passed = [f"call.{path_of[name]}" for name in required]
        passed += [f"{name}=call.{path_of[name]}" for name in self.given(call)]
        return eval(f"lambda op, call: op({', '.join(passed)})")

    def given(self, call: Any) -> list[str]:
        """The arguments with a default that calls like ``call`` must pass: tensors, numbers that
        differ from their default, and numbers that belong to a tensor that is passed (``max_q_len``
        with ``q_offsets``)."""
        values = dict(zip(self.names, self.arguments_of(call), strict=True))
        given = []
        tensor_is_there = False  # the last one before a number
        for name, default in zip(self.names[-len(self.defaults) :], self.defaults, strict=True):
            is_tensor = name in self.tensors
            if is_tensor:
                tensor_is_there = values[name] is not None
            if tensor_is_there or (not is_tensor and values[name] != default):
                given.append(name)
        return given


def _named_tuple(names: tuple[str, ...], defaults: Sequence[object]) -> Any:
    """A class whose fields are known to the schema only."""
    return namedtuple("Arguments", names, defaults=defaults)


def _tuple_of(paths: list[str]) -> Callable[[Any], tuple]:
    """A function that returns these attributes of a call. Generated as source, for
    torch.compile."""
    return eval(f"lambda call: ({', '.join(f'call.{path}' for path in paths)},)")


_DEFAULTS = {"None": None, "0": 0, "-1": -1, "0.0": 0.0, "False": False, "True": True}

_WHERE_KEYS_LIE = "Tensor? kv_lengths=None, Tensor? page_table=None, Tensor? kv_begin=None"
_SCALES = "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_zero=None, Tensor? v_zero=None"
_BIASES = "Tensor? sinks=None, Tensor? value_head_map=None, Tensor? alibi_slopes=None, "
_BIASES += "Tensor? attn_mask=None"
_PACKED = "Tensor? q_offsets=None, SymInt max_q_len=0, SymInt max_kv_len=0"
_SCORES = "float? scale=None, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, "
_SCORES += "bool batch_invariant=False"
_DROPOUT = "float dropout_p=0.0, Tensor? dropout_seed=None"
_RANGES = "Tensor? key_ranges=None"

_KV = ("k", "v", "kv_lengths", "page_table", "kv_begin", "k_scale", "v_scale", "k_zero", "v_zero")
_IN_VIEW = {name: f"kv.{name}" for name in _KV}
_IN_OPTIONS = ("scale", "window_left", "window_right", "softcap", "batch_invariant", "dropout_p")
_IN_CALL = {
    **_IN_VIEW,
    **{name: f"options.{name}" for name in _IN_OPTIONS},
    "head_map": "head_map_tensor",
    "value_head_map": "value_head_map_tensor",
}


def forward(
    head_map: str = "head_map", returns: str = "(Tensor out, Tensor lse)", more: str = ""
) -> Schema:
    """Attention. Returns out ``[B, Hq, Sq, Dv]`` and the LSE, fp32 ``[B, Hq, Sq]``.

    Rare arguments come last, so that most calls can omit them.

    Args:
        head_map: name of the argument that holds the head map: int32 ``[Hq]``, or a plan of it.
        returns: in torch's notation.
        more: further arguments, after the others.

    The ops take tensors as :class:`~gqa_kernels.call.attention.AttentionCall` and its
    :class:`~gqa_kernels.cache.view.KVView` have them.
    """
    return Schema(
        f"Tensor q, Tensor k, Tensor v, Tensor {head_map}, {_SCORES}, bool bshd=False, "
        f"{_WHERE_KEYS_LIE}, {_BIASES}, {_PACKED}, {_SCALES}, {_DROPOUT}, {_RANGES}{more}",
        returns,
        _IN_CALL,
    )


def auxiliary(head_map: str = "head_map") -> Schema:
    """Attention with the results that an AuxRequest (``gqa_kernels/call/auxiliary.py``) adds to out
    and LSE, in the form of AuxOutput. Results that were not requested are empty. Not
    differentiable."""
    return forward(
        head_map,
        "(Tensor out, Tensor lse, Tensor max_scores, Tensor key_scores)",
        ", bool max_scores=False, SymInt key_scores=0",
    )


def into(head_map: str = "head_map") -> Schema:
    """Attention into the caller's ``out [B, Hq, Sq, Dv]`` and contiguous ``lse``, fp32 ``[B, Hq,
    Sq]`` or None. Nothing is differentiated."""
    return forward(head_map, "()", ", Tensor(a!)? out=None, Tensor(b!)? lse=None")


def backward(head_map: str = "head_map") -> Schema:
    """Gradients of the forward op over dense tensors or packed sequences, deterministic. ``out``
    and ``lse`` are the forward's results, ``dout`` and ``dlse`` their gradients (fp32, contiguous,
    or None: zeros). Returns dq, dk and dv in the types and shapes of q, k and v; dslopes fp32
    ``[B, Hq]`` and dsinks fp32 ``[Hq]``, empty if not needed."""
    return Schema(
        f"Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor {head_map}, {_BIASES}, Tensor? kv_lengths=None, Tensor? kv_begin=None, {_PACKED}, "
        f"{_SCORES}, {_DROPOUT}, {_RANGES}, bool need_slopes=False, bool need_sinks=False",
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dslopes, Tensor dsinks)",
    )


FORWARD, BACKWARD = forward(), backward()
AUXILIARY = auxiliary()
INTO = into()
FILLED = ("out", "lse")  # what it writes
# Attention that keeps no LSE, with the arguments that most calls have. Torch takes time for each
# argument of an op, also for one that a call leaves out. Calls with other arguments use FORWARD.
OUTPUT = Schema(
    "Tensor q, Tensor k, Tensor v, Tensor head_map, float? scale=None, SymInt window_left=-1, "
    "SymInt window_right=-1, float softcap=0.0, bool bshd=False, Tensor? kv_lengths=None, "
    "Tensor? page_table=None, Tensor? sinks=None",
    "Tensor",
    _IN_CALL,
)

# The same over dense tensors, at most causal: the calls whose time torch's share of it decides.
DENSE_OUTPUT = Schema(
    "Tensor q, Tensor k, Tensor v, Tensor head_map, float? scale=None, SymInt window_right=-1, "
    "bool bshd=False",
    "Tensor",
    _IN_CALL,
)

# Writes new tokens after the existing ones, rotated and quantised. Returns the rotated q, or an
# empty tensor if there is no q. Tensors are as in gqa_kernels.call.append.AppendCall.
APPEND = Schema(
    "Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, Tensor kv_lengths, SymInt max_new, "
    "Tensor? page_table=None, Tensor? kv_begin=None, Tensor? new_offsets=None, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor(e!)? k_zero=None, "
    "Tensor(f!)? v_zero=None, Tensor? q=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "bool rotary_interleaved=False",
    "Tensor",
    {**_IN_VIEW, "q": "rotated_q"},
)
WRITTEN = ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")

# Moves key indices[b, h, i] to place i, for i < counts[b, h]. indices is int32 [B, Hk, n] and
# ascending, counts int32 [B, Hk]. Tensors are as in gqa_kernels.call.keep.KeepCall.
KEEP = Schema(
    "Tensor indices, Tensor counts, Tensor(a!) k, Tensor(b!) v, Tensor kv_lengths, "
    "Tensor? page_table, Tensor? kv_begin, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor(e!)? k_zero, Tensor(f!)? v_zero",
    "()",
    _IN_VIEW,
)

# Whether every key of a view on the CPU, and each new token after them, has a slot within its
# sequence's capacity, in a page that exists. The op reads values, so it has no fake kernel.
SLOTS_EXIST = Schema(
    "Tensor kv_lengths, Tensor? page_table, Tensor? kv_begin, Tensor? new_offsets, int new_tokens, "
    "int num_pages, int page_size",
    "bool",
)


def define(name: str, schema: Schema) -> None:
    """Define the op ``gqa_kernels::name``."""
    torch.library.define(NAMESPACE + name, schema.text)


def fake_forward(schema: Schema) -> Callable[..., tuple[Tensor, Tensor]]:
    """Fake kernel of a forward op."""

    def fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return empty_results(schema.Arguments(*arguments, **named))

    return fake


def fake_auxiliary(schema: Schema) -> Callable[..., tuple[Tensor, ...]]:
    """Fake kernel of attention with auxiliary outputs."""

    def fake(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        return empty_auxiliary(schema.Arguments(*arguments, **named))

    return fake


def empty_auxiliary(call: Any) -> tuple[Tensor, ...]:
    """Uninitialised out, LSE, max_scores and key_scores."""
    batch = call.q.shape[0] if call.q_offsets is None else call.q_offsets.shape[0] - 1
    slots = call.k.shape[2] * (1 if call.page_table is None else call.page_table.shape[2])
    heads, k_heads = call.q.shape[1], call.k.shape[1]
    shapes = (
        (batch if call.max_scores else 0, heads),
        (batch if call.key_scores else 0, k_heads, slots),
    )
    more = (call.q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return (*empty_results(call), *more)


def fake_output(schema: Schema) -> Callable[..., Tensor]:
    """Fake kernel of attention that keeps no LSE."""

    def fake(*arguments: Any, **named: Any) -> Tensor:
        return empty_results(schema.Arguments(*arguments, **named))[0]

    return fake


def fake_backward(schema: Schema) -> Callable[..., tuple[Tensor, ...]]:
    """Fake kernel of a backward op."""

    def fake(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        return empty_gradients(schema.Arguments(*arguments, **named))

    return fake


def fake_append(*arguments: Any, **named: Any) -> Tensor:
    """Fake kernel of an append op."""
    call = APPEND.Arguments(*arguments, **named)
    return call.k_new.new_empty(0) if call.q is None else torch.empty_like(call.q)


def fake_nothing(*_: Any, **__: Any) -> None:
    """Fake kernel of an op that returns nothing."""


def empty_results(call: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised out and LSE of a forward op's arguments."""
    q = call.q
    out = empty_output(q, value_head_dim(call.v), call.bshd)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def value_head_dim(v: Tensor) -> int:
    """The head dim ``Dv`` of stored values."""
    return v.shape[3] * (2 if v.dtype == torch.uint8 else 1)  # int4: two numbers in a byte


def empty_output(q: Tensor, value_head_dim: int, bshd: bool) -> Tensor:
    """Uninitialised ``[B, Hq, Sq, Dv]`` for queries ``[B, Hq, Sq, D]``, in memory ``[B, Sq, Hq,
    Dv]`` for ``bshd``."""
    batch, heads, tokens, _ = q.shape
    if bshd:
        return q.new_empty(batch, tokens, heads, value_head_dim).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, value_head_dim)


def empty_gradients(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of a backward op's arguments."""
    q, heads = call.q, call.q.shape[1]
    batch = q.shape[0] if call.q_offsets is None else call.q_offsets.shape[0] - 1
    dslopes = q.new_empty((batch, heads) if call.need_slopes else (0,), dtype=torch.float32)
    dsinks = q.new_empty((heads,) if call.need_sinks else (0,), dtype=torch.float32)
    return (*(x.new_empty(x.shape) for x in (q, call.k, call.v)), dslopes, dsinks)
