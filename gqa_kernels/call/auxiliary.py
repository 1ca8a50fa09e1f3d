"""What attention can return besides its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..native.arguments import as_bool, as_int, shown


class AuxRequest(NamedTuple):
    """Further outputs of attention, as ``return_aux`` takes them; after torch's own class
    (``torch.nn.attention.flex_attention.AuxRequest``), which is accepted too.

    Attributes:
        lse: the log-sum-exp of the scores.
        max_scores: the largest score per (sequence, query head): what QK-clip looks at.
        key_scores: a number ``w`` of queries, 0 for none: the attention that each key gets from the
            last ``w`` queries: what H2O, SnapKV and TOVA evict by.

    Examples:
        >>> import torch
        >>> from gqa_kernels import AuxRequest, asym_gqa_attention
        >>> q, k, v = (torch.randn(1, heads, 8, 16) for heads in (3, 2, 2))
        >>> out, aux = asym_gqa_attention(q, k, v, [0, 0, 1], return_aux=AuxRequest(key_scores=4))
        >>> aux.key_scores.shape
        torch.Size([1, 2, 8])
    """

    lse: bool = False
    max_scores: bool = False
    key_scores: int = 0

    def output(self, lse: Tensor, max_scores: Tensor, key_scores: Tensor) -> AuxOutput:
        """Those of an op's results that were asked for."""
        return AuxOutput(
            lse if self.lse else None,
            max_scores if self.max_scores else None,
            key_scores if self.key_scores else None,
        )


class AuxOutput(NamedTuple):
    """The outputs that an :class:`AuxRequest` asked for; None for the others. They are fp32, or
    fp64 if q is.

    Attributes:
        lse: ``[B, Hq, Sq]`` (``[Hq, total_q]`` for packed queries).
        max_scores: ``[B, Hq]``, -inf if a head sees no key. Scores are scaled, capped and
            biased; sinks don't count.
        key_scores: ``[B, Hk, Sk]`` (the capacity for a cache): the sum of the probabilities
            that the last ``w`` queries of the KV head's query heads give to a key, before dropout.
            0 beyond the length.

    Examples:
        >>> import torch
        >>> from gqa_kernels import AuxRequest, asym_gqa_attention
        >>> q, k, v = (torch.randn(1, heads, 8, 16) for heads in (3, 2, 2))
        >>> request = AuxRequest(max_scores=True)
        >>> out, aux = asym_gqa_attention(q, k, v, [0, 0, 1], return_aux=request)
        >>> aux.max_scores.shape, aux.lse
        (torch.Size([1, 3]), None)
    """

    lse: Tensor | None = None
    max_scores: Tensor | None = None
    key_scores: Tensor | None = None


def as_aux_request(request: object, return_lse: bool) -> AuxRequest:
    """Check ``return_aux``, beside ``return_lse``.

    Raises:
        TypeError, ValueError: the message names the field.
    """
    if not isinstance(request, tuple) or not hasattr(request, "max_scores"):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {shown(request)}")
    if return_lse:
        raise ValueError("return_lse must be False with return_aux: AuxRequest(lse=True) has it")
    queries = as_int("return_aux.key_scores", getattr(request, "key_scores", 0))
    if queries < 0:
        raise ValueError(f"return_aux.key_scores must be non-negative, got {queries}")
    return AuxRequest(
        as_bool("return_aux.lse", getattr(request, "lse", False)),
        as_bool("return_aux.max_scores", request.max_scores),
        queries,
    )
