"""Attention with auxiliary outputs, from the backend's kernels or in eager torch after them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.attention import AttentionCall
from ..call.auxiliary import AuxOutput, AuxRequest
from .base import Backend
from .reference.scores import key_scores, max_scores


def attend_with_auxiliary(
    call: AttentionCall, request: AuxRequest, backend: Backend
) -> tuple[Tensor, AuxOutput]:
    """Out, as ``Backend.attend`` returns it, and what the request asks for beside it."""
    call.lse_wanted = request.lse
    scored = request.max_scores or request.key_scores > 0
    if scored and backend.fuses_auxiliary(call):
        return backend.attend_with_auxiliary(call, request)
    out, lse = backend.attend(call)
    if not scored:
        return out, AuxOutput(lse if request.lse else None)
    with torch.no_grad(), torch.autocast(call.device.type, enabled=False):
        return out, AuxOutput(
            lse if request.lse else None,
            max_scores(call) if request.max_scores else None,
            key_scores(call, request.key_scores) if request.key_scores else None,
        )
