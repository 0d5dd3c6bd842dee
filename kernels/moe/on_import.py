"""Doing something with a module when it is first imported, without importing it oneself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def on_import(name: str, action: Callable[[ModuleType], object]) -> None:
    """Calls ``action`` with the module ``name``: now if it is there, else once, right after it has run.

    Asking again for the same module and action, or after it happened, is harmless if the action is.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.wants(name, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module as usual, with a loader that acts afterwards."""

    def __init__(self, name: str, action: Callable[[ModuleType], object]) -> None:
        self._name, self._action = name, action

    def wants(self, name: str, action: Callable[[ModuleType], object]) -> bool:
        return (self._name, self._action) == (name, action)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        # Out of the way first: the search below, by whatever finders there are, must not come back here.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Acting(spec.loader, self._action)
        return spec


class _Acting(Loader):
    """Another loader, with the action after the module has run."""

    def __init__(self, inner: Loader, action: Callable[[ModuleType], object]) -> None:
        self._inner, self._action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> object:
        # What others ask a loader for (get_source, is_package) the real one knows.
        return getattr(self._inner, name)
