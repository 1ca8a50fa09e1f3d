"""AsymGroupedQueryAttention: projections around asym_gqa_attention, with the head map as a
buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention import asym_gqa_attention
from ..call.checks import HeadMapLike
from ..head_map import HeadMap
from .allocation import KeyNormAllocation
from .rotary import rotary


class AsymGroupedQueryAttention(nn.Module):
    """Self-attention whose query heads share KV heads by a map.

    The map is a buffer: it is saved in the state dict. It may change between steps without
    recompilation and, on an accelerator, without synchronisation. Data-parallel training broadcasts
    the first rank's buffers, and so its map.

    Args:
        embed_dim: channels of input and output.
        num_heads, num_kv_heads: ``Hq`` and ``Hkv``.
        head_map: ``Hq`` integers in ``[0, Hkv)``. By default, consecutive groups of sizes that
            differ by one at most.
        allocation: None for a fixed map, or a name in ``ALLOCATIONS``. Call
            :func:`step_allocations` after each optimizer step.
        window: steps between two allocations of the DGQA kinds.
        perturbation: factor of the noise of PGQA (arXiv 2408.08454). Training subtracts from the
            attention's output Gaussian noise with the mean and deviation of each row, and zero at
            each token's own channel index.
        head_dim: default ``embed_dim // num_heads``.
        bias: whether the projections have one.
        rotary_base: base of the rotary embedding's frequencies; None for no rotary embedding.
        dropout: probability of dropping attention weights, in training.
        backend: of :func:`gqa_kernels.asym_gqa_attention`.

    Examples:
        >>> import torch
        >>> from gqa_kernels.nn import AsymGroupedQueryAttention
        >>> layer = AsymGroupedQueryAttention(96, 12, 4, allocation="kdgqa", rotary_base=10000.0)
        >>> layer(torch.randn(2, 16, 96), causal=True).shape
        torch.Size([2, 16, 96])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_map: HeadMapLike | None = None,
        allocation: str | None = None,
        window: int = 300,
        perturbation: float = 0.0,
        head_dim: int | None = None,
        bias: bool = False,
        rotary_base: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads ({num_heads}) where no head_dim is "
                    f"given, got {embed_dim}"
                )
            head_dim = embed_dim // num_heads
        if rotary_base is not None and head_dim % 2:
            raise ValueError(f"head_dim must be even with rotary_base, got {head_dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.perturbation, self.rotary_base = perturbation, rotary_base
        self.dropout, self.backend = dropout, backend
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.register_buffer("head_map", torch.zeros(num_heads, dtype=torch.int32))
        if head_map is None:
            head_map = [h * num_kv_heads // num_heads for h in range(num_heads)]
        self.set_head_map(head_map)
        self.allocation = None
        if allocation is not None:
            self.allocation = KeyNormAllocation(allocation, num_heads, num_kv_heads, window)

    @torch.no_grad()
    def set_head_map(self, head_map: HeadMapLike) -> None:
        """Write another map into the buffer."""
        if isinstance(head_map, Tensor):
            head_map = head_map.tolist()
        checked = HeadMap(head_map, self.num_kv_heads)
        if checked.num_heads != self.num_heads:
            raise ValueError(
                f"head_map must have one entry per query head ({self.num_heads}), "
                f"got {checked.num_heads}"
            )
        self.head_map.copy_(checked.tensor())

    def step_allocation(self) -> None:
        """Report a finished training step. The allocation, if there is one, may then write a new
        map."""
        if self.allocation is not None:
            self.allocation.step(self.head_map)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        positions: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Self-attention of ``x`` ``[B, S, embed_dim]``, in the same shape.

        Args:
            positions: ``[S]`` or ``[B, S]``, for the rotary embedding; default 0, 1, ...
            options: further options of :func:`gqa_kernels.asym_gqa_attention`.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.training and self.allocation is not None:
            self.allocation.observe(k, self.head_map)
        if self.rotary_base is not None:
            if positions is None:
                positions = torch.arange(length, device=x.device)
            q, k = (rotary(y, positions, self.rotary_base) for y in (q, k))
        out = asym_gqa_attention(
            q, k, v,
            self.head_map.clone(),  # backward needs this map even if the buffer changes
            causal=causal, dropout_p=self.dropout if self.training else 0.0, layout="bshd",
            backend=self.backend, **options,
        )  # fmt: skip
        if self.training and self.perturbation:
            out = out - self.perturbation * _noise_like(out)
        return self.out_proj(out.flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _noise_like(out: Tensor) -> Tensor:
    """Noise with the mean and deviation of each row of ``out`` ``[B, S, H, D]``. It is zero in the
    channel whose index equals the token's."""
    rows = out.detach().float()
    noise = torch.randn_like(rows)
    noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
    noise = noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)
    token = torch.arange(out.shape[1], device=out.device)[:, None, None]
    return noise.masked_fill(token == torch.arange(out.shape[3], device=out.device), 0).to(
        out.dtype
    )


def step_allocations(model: nn.Module) -> None:
    """Report a finished training step to every AsymGroupedQueryAttention of ``model``.

    Examples:
        >>> import torch
        >>> from gqa_kernels.nn import AsymGroupedQueryAttention, step_allocations
        >>> layer = AsymGroupedQueryAttention(96, 12, 4, allocation="kdgqa")
        >>> layer(torch.randn(2, 16, 96), causal=True).sum().backward()
        >>> step_allocations(layer)  # after the optimizer's step
    """
    for module in model.modules():
        if isinstance(module, AsymGroupedQueryAttention):
            module.step_allocation()
