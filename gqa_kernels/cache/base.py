"""KVCache: what dense and paged caches share: lengths, scales, and the view of their memory."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ..native.arguments import as_bool, as_int, check_tensors, shown
from .formats import STORED_AS, Format
from .hadamard import check_head_dim, rotate_by_hadamard
from .memory import empty
from .view import KVView

MAX_LENGTH = 2**31 - 1  # lengths are int32


class Scales(TypedDict, total=False):
    """The scales and zeros of a quantised cache, as :meth:`KVView.create` takes them."""

    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    k_zero: Tensor | float | None
    v_zero: Tensor | float | None


class KVCache(ABC):
    """Memory that holds the keys and values of a batch; it may belong to an engine.

    Attributes:
        k: ``[P, Hk, page_size, D]``, see :mod:`gqa_kernels.cache.view`; ``v`` likewise.
        lengths: ``[B]`` or ``[B, Hk]`` integers, keys there are. An append advances it in place.
        k_scale, v_scale, k_zero, v_zero: of a quantised cache, as :meth:`KVView.create` takes them.
        next_positions: ``[B]`` integers, position of each sequence's next token, once it is not
            its length: :meth:`keep` sets it, :meth:`advance` counts it on, and an append rotates by
            it. None before.
        k_channels: fp32 ``[Hk, D]`` or None: keys are stored divided by these, and queries are
            multiplied by them, so that large columns take no steps from the others (KIVI, arXiv
            2402.02750; SmoothQuant).
        hadamard: keys are stored rotated (:mod:`gqa_kernels.cache.hadamard`), after the division.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    k_zero: Tensor | float | None
    v_zero: Tensor | float | None

    next_positions: Tensor | None = None
    k_channels: Tensor | None = None
    hadamard: bool = False

    append: Callable[..., Tensor | None]  # gqa_kernels.decode.append, which runs a backend
    keep: Callable[..., None]  # gqa_kernels.keep.keep, likewise
    write: Callable[..., None]  # gqa_kernels.write.write, likewise

    _kept: tuple[tuple, list, KVView] | None = None

    @abstractmethod
    def _parts(self) -> tuple[Tensor | float | None, ...]:
        """Everything that the view is made of, K and V first."""

    @abstractmethod
    def _create_view(self) -> KVView:
        """A new view, whose values are not looked at."""

    def _transform_keys(self, k_channels: Tensor | None, hadamard: object) -> None:
        """Have keys divided by channels, and rotated, if they fit k."""
        view = self.unchecked_view()
        if k_channels is not None:
            check_tensors(k_channels=k_channels)
            shape = (view.num_k_heads, view.head_dim)
            if k_channels.shape != shape or k_channels.device != view.device:
                raise ValueError(
                    f"k_channels must have shape {shape}, [Hk, D], on {view.device}, got "
                    f"{tuple(k_channels.shape)} on {k_channels.device}"
                )
            if k_channels.dtype != torch.float32:
                raise TypeError(f"k_channels.dtype must be float32, got {k_channels.dtype}")
        self.k_channels = k_channels
        self.hadamard = as_bool("hadamard", hadamard)
        if self.hadamard:
            check_head_dim(view.head_dim)

    @property
    def key_transform(self) -> Callable[[Tensor], Tensor] | None:
        """:meth:`stored_keys`; None if keys are stored as they come."""
        return self.stored_keys if self.hadamard or self.k_channels is not None else None

    def stored_keys(self, k: Tensor) -> Tensor:
        """New keys ``[.., Hk, S, D]``, rotated by position, as the cache stores them."""
        if self.k_channels is not None:
            k = (k.float() / self.k_channels[:, None]).to(k.dtype)
        return rotate_by_hadamard(k) if self.hadamard else k

    def matching_queries(self, q: Tensor, head_map: Tensor) -> Tensor:
        """Queries ``[.., Hq, S, D]`` to multiply with stored keys.

        Args:
            head_map: integers ``[Hq]``.
        """
        if self.k_channels is not None:
            key_head = head_map.long().clamp(0, len(self.k_channels) - 1)
            q = (q.float() * self.k_channels[key_head][:, None]).to(q.dtype)
        return rotate_by_hadamard(q) if self.hadamard else q

    def view(self) -> KVView:
        """The normalised form; checks every value that the host can see.

        Raises:
            ValueError, TypeError: as :meth:`KVView.create`.
        """
        view = self.unchecked_view()
        view.check_slots(0)
        return view

    def unchecked_view(self) -> KVView:
        """:meth:`view` without a look at lengths, begins and page ids.

        It is made once: the view shares the memory of the cache's tensors, and so sees what is
        written to them. Another tensor or number in their place, or a tensor that was resized or
        set to other memory, makes a new one. A view that holds copies (of 64-bit integers) is
        never kept.
        """
        if torch.compiler.is_compiling():
            return self._create_view()
        parts = self._parts()
        tensors = [x for x in parts if isinstance(x, Tensor)]
        kept = self._kept
        if kept is not None and all(map(operator.is_, parts, kept[0])) and all(
            _place(x) == place for x, place in zip(tensors, kept[1], strict=True)
        ):  # fmt: skip
            return kept[2]
        view = self._create_view()
        shared = all(
            type(x) is Tensor and x.dtype != torch.int64 for x in (*tensors, view.kv_lengths)
        )
        # Made here and now: what inference mode makes of a number, and a view without gradients.
        number = any(isinstance(x, (int, float)) for x in parts)
        differentiable = any(x.requires_grad for x in tensors[2:])
        if shared and not (number and torch.is_inference_mode_enabled()) and not differentiable:
            self._kept = parts, [_place(x) for x in tensors], view
        return view

    def __getstate__(self) -> dict:
        """Without the view, which a copy makes of its own tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    @property
    def scales(self) -> Scales:
        """The scales and zeros by name."""
        return {
            "k_scale": self.k_scale, "v_scale": self.v_scale,
            "k_zero": self.k_zero, "v_zero": self.v_zero,
        }  # fmt: skip

    def advance(self, tokens: int | Tensor) -> None:
        """Count ``tokens`` (an integer, or ``[B]``) more keys per sequence, in place."""
        if isinstance(tokens, Tensor):
            check_tensors(tokens=tokens)
            batch = self.lengths.shape[0]
            if tokens.dtype not in (torch.int32, torch.int64) or tokens.shape not in ((), (batch,)):
                raise TypeError(
                    f"tokens must be an integer, or an int32 or int64 tensor of shape ({batch},), "
                    f"got {shown(tokens)}"
                )
            if tokens.dim() and tokens.device != self.lengths.device:
                raise ValueError(
                    f"tokens.device must be that of lengths ({self.lengths.device}), "
                    f"got {tokens.device}"
                )
            if tokens.dim() and self.lengths.dim() == 2:
                tokens = tokens[:, None]
        elif type(tokens) is not int or not -MAX_LENGTH <= tokens <= MAX_LENGTH:
            tokens = as_int("tokens", tokens)
            if isinstance(tokens, int) and not -MAX_LENGTH <= tokens <= MAX_LENGTH:
                raise ValueError(f"tokens must fit into 32 bits, got {tokens}")
        self.lengths.add_(tokens)
        if self.next_positions is not None:
            column = isinstance(tokens, Tensor) and tokens.dim() == 2
            self.next_positions.add_(tokens[:, 0] if column else tokens)  # type: ignore[index]


def checked_sizes(**sizes: object) -> tuple[int, ...]:
    """Sizes of memory to be made, by the caller's names of them."""
    found = []
    for name, size in sizes.items():
        size = as_int(name, size)
        if isinstance(size, int) and not 0 <= size <= MAX_LENGTH:
            raise ValueError(f"{name} must lie in [0, 2**31), got {size}")
        found.append(size)
    return tuple(found)


def _place(x: Tensor) -> tuple:
    """What changes when a tensor moves to other memory or takes another form."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def formats_of(name: str | None) -> tuple[Format | None, Format | None]:
    """The formats of K and V in a cache of that ``format``."""
    if name is None:
        return None, None
    if not isinstance(name, str) or name not in STORED_AS:
        raise ValueError(f"format must be None or one of {tuple(STORED_AS)}, got {shown(name)}")
    return STORED_AS[name]


def empty_storage(
    pages: int, heads: int, slots: int, dim: int, format: Format | None, dtype: torch.dtype,
    device: torch.device | str, tokens_first: bool,
) -> Tensor:  # fmt: skip
    """Uninitialised ``[pages, heads, slots, dim]`` memory, in a format if there is one.

    Args:
        tokens_first: a page is ``[slots, heads, dim]`` in memory.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}")
    if format is not None:
        if dim % format.per_byte:
            raise ValueError(f"the head dim must be even for format {format.name!r}, got {dim}")
        dtype, dim = format.storage, dim // format.per_byte
    if tokens_first:
        return empty(pages, slots, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    return empty(pages, heads, slots, dim, dtype=dtype, device=device)


def empty_scales(k: Tensor, v: Tensor, format: str | None, zeros: bool) -> Scales:
    """Scales of each token and head, and zeros if requested, of a quantised cache."""
    zeros = as_bool("zeros", zeros)
    if format is None:
        return {}
    if zeros and not all(found.integer for found in STORED_AS[format]):
        raise ValueError(f"zeros must be False for format {format!r}: only integers have zeros")
    k_scale, v_scale = (x.new_empty(x.shape[:3], dtype=torch.float32) for x in (k, v))
    scales: Scales = {"k_scale": k_scale, "v_scale": v_scale}
    if zeros:
        scales["k_zero"], scales["v_zero"] = torch.empty_like(k_scale), torch.empty_like(v_scale)
    return scales
