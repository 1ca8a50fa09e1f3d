"""Fingerprints: record which inputs a resumable file was made from.

Every file that a later run continues (running sums, moments, plans, recovery states, checkpoints,
benchmark results) stores one, and ``check_same`` refuses to continue it with other inputs::

    made_from = fingerprint(model, batches, steps=100)
    ...
    check_same(path, stored, made_from)

A fingerprint maps the name of each input ("weights", "data", an option's name) to a digest, or to
the value itself if it is an option.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import Batch
from .maps import IMPLEMENTATION_FIELD, KEY_FIELD, VALUE_FIELD

Fingerprint = dict[str, str]

# Fields of a config that differ between two loads of one model, or that don't affect its function.
_VOLATILE = {
    "_name_or_path", "_attn_implementation", IMPLEMENTATION_FIELD, "architectures", "dtype",
    "torch_dtype", "transformers_version",
}  # fmt: skip
_DIGEST = "sha256:"
_SHOWN = 40  # longest option value in a message


def fingerprint(
    model: nn.Module | None = None, batches: Iterable[Batch] | None = None, **options: Any
) -> Fingerprint:
    """The fingerprint of those inputs that are passed: a model, data, options.

    Args:
        model: its config (if any), head maps, and all weights and buffers of its state dict.
        batches: in the form that ``calibrate`` takes.
        options: values that JSON can represent.

    Example:
        >>> fingerprint(steps=100)
        {'steps': '100'}
    """
    parts = {}
    if model is not None:
        config = model.config.to_dict() if hasattr(model, "config") else {}
        maps = [config.pop(field, None) for field in (KEY_FIELD, VALUE_FIELD)]
        parts["model config"] = _digest(_json(_stable(config)).encode())
        parts["head maps"] = _digest(_json(maps).encode())
        parts["weights"] = tensors_digest(model.state_dict())
    if batches is not None:
        data = DataDigest()
        for batch in batches:
            data.add(batch)
        parts["data"] = data.value
    return parts | {name: _json(value) for name, value in options.items()}


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """A digest of tensors: their names, types, shapes and values. Other values are digested as
    text."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        _add(found, name, tensors[name])
    return _DIGEST + found.hexdigest()


class DataDigest:
    """A digest of batches, added one after the other.

    Attributes:
        count: number of batches so far.
    """

    def __init__(self):
        self.count = 0
        self._found = hashlib.sha256()

    def add(self, batch: Batch) -> None:
        named = {"": batch} if isinstance(batch, Tensor) else batch
        for name in sorted(named):
            _add(self._found, name, named[name])
        self.count += 1

    @property
    def value(self) -> str:
        """The digest of the batches so far."""
        return _DIGEST + self._found.hexdigest()


def check_same(path: Any, stored: Mapping[str, str] | None, current: Mapping[str, str]) -> None:
    """Raise ValueError unless a file was made from the same inputs as this run.

    Args:
        path: the file.
        stored: the file's fingerprint, None if it has none.
        current: this run's fingerprint. Inputs that only the file names are not compared.
    """
    if stored is None:
        raise ValueError(
            f"{path} must say what it was made from, got a file without fingerprint: delete it, or "
            "name another place, to start again"
        )
    changed = [_change(n, stored.get(n), now) for n, now in current.items() if stored.get(n) != now]
    if changed:
        raise ValueError(
            f"{path} was made from other parts than this run: {', '.join(changed)}. Give the same "
            "to continue; delete the file, or name another place, to start again"
        )


def _change(name: str, stored: str | None, current: str) -> str:
    short = all(len(x) <= _SHOWN and not x.startswith(_DIGEST) for x in (stored or "", current))
    return f"{name} (was {stored or 'not given'}, is {current})" if short else name


def _add(found: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        found.update(_json([name, value]).encode())
        return
    found.update(_json([name, str(value.dtype), list(value.shape)]).encode())
    flat = value.detach().cpu().contiguous().flatten()
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)


def _stable(config: Any) -> Any:
    """A config without the fields that differ between two loads of one model."""
    if not isinstance(config, dict):
        return config
    return {str(k): _stable(v) for k, v in config.items() if k not in _VOLATILE}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(data: bytes) -> str:
    return _DIGEST + hashlib.sha256(data).hexdigest()
