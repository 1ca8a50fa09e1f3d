"""KVCache: what dense and paged caches share: lengths, scales, and the view of their memory."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from .formats import FORMAT_OF_NAME
from .memory import empty
from .view import KVView


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
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    k_zero: Tensor | float | None
    v_zero: Tensor | float | None

    append: Callable[..., Tensor | None]  # gqa_kernels.decode.append, which runs a backend

    _kept: tuple[tuple, list, KVView] | None = None

    @abstractmethod
    def _parts(self) -> tuple[Tensor | float | None, ...]:
        """Everything that the view is made of, K and V first."""

    @abstractmethod
    def _create_view(self) -> KVView:
        """A new view, whose values are not looked at."""

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
        if isinstance(tokens, Tensor) and self.lengths.dim() == 2:
            tokens = tokens[:, None]
        self.lengths.add_(tokens)


def _place(x: Tensor) -> tuple:
    """What changes where a tensor comes to lie elsewhere or in another form."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def empty_storage(
    pages: int, heads: int, slots: int, dim: int, dtype: torch.dtype,
    device: torch.device | str,
    format: str | None, tokens_first: bool,
) -> Tensor:  # fmt: skip
    """Uninitialised ``[pages, heads, slots, dim]`` memory, in a format where one is named.

    Args:
        tokens_first: a page is ``[slots, heads, dim]`` in memory.
    """
    if format is not None:
        if format not in FORMAT_OF_NAME:
            raise ValueError(
                f"format must be None or one of {tuple(FORMAT_OF_NAME)}, got {format!r}"
            )
        found = FORMAT_OF_NAME[format]
        if dim % found.per_byte:
            raise ValueError(f"the head dim must be even for format {format!r}, got {dim}")
        dtype, dim = found.storage, dim // found.per_byte
    if tokens_first:
        return empty(pages, slots, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    return empty(pages, heads, slots, dim, dtype=dtype, device=device)


def empty_scales(k: Tensor, v: Tensor, format: str | None, zeros: bool) -> Scales:
    """Scales of each token and head, and zeros where asked for, of a quantised cache."""
    if format is None:
        return {}
    if zeros and not FORMAT_OF_NAME[format].integer:
        raise ValueError(f"zeros must be False for format {format!r}: only integers have zeros")
    k_scale, v_scale = (x.new_empty(x.shape[:3], dtype=torch.float32) for x in (k, v))
    scales: Scales = {"k_scale": k_scale, "v_scale": v_scale}
    if zeros:
        scales["k_zero"], scales["v_zero"] = torch.empty_like(k_scale), torch.empty_like(v_scale)
    return scales
