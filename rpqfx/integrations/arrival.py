"""Registers with transformers when both libraries are there, in whichever order they were imported.

transformers looks methods of quantisation up in a table of its module ``transformers.quantizers.auto``, and finds no
plugins by itself. Importing that module takes seconds, which nobody should pay for ``import rpqfx``; so where it is not
there yet, a finder on ``sys.meta_path`` waits for it, lets the import run as it would, and registers at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.quantizers.auto"


def register_on_arrival() -> None:
    """Registers now, where transformers is that far, or else once it is."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Registers, where this transformers has what that takes; version 4 has not, and works without.

    Importing our module registers; where that import is what has brought transformers here, it is under way already.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("rpqfx.integrations.transformers")


class _Finder(MetaPathFinder):
    """Finds one module, through whoever would have found it, and then leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the module's own spec, with a loader that registers at the end.

        Args:
            fullname: Name of the module that is being imported.
            path: Where to look for it.
            target: As finders are given it.
        """
        if fullname != AWAITED:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Loads a module as its own loader does, and registers when it has run."""

    def __init__(self, own: Loader, finder: _Finder) -> None:
        self._own, self._finder = own, finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Makes the module as its own loader does.

        Args:
            spec: Of the module.
        """
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, and registers where nothing was raised.

        Args:
            module: As ``create_module`` made it.
        """
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        _register()
