"""A module that stands in for another library's, for a test."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Make ``import name`` give a module of just ``contents``, in packages of nothing else."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if not isinstance(sys.modules.get(package), _StandIn):
            monkeypatch.setitem(sys.modules, package, _StandIn(package))
    module = _StandIn(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class _StandIn(ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []  # a package: it may have modules
