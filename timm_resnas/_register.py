"""Registers the models with timm when timm, or a module of ours that needs it, is first imported.

Importing timm takes seconds. A program that only answers ``--help``, or reads its options before its work, must not
wait for it because of ``import timm_resnas``; one that uses timm must find the models whichever was imported first.
"""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __package__
# these need no timm
LIGHT = (
    *("__main__", "_register", "engine", "engine.launcher", "engine.options", "engine.settings", "recipes", "run"),
    "version",
)


def register() -> None:
    """Register the models: at once where timm is there, otherwise after the first import that brings it."""
    if "timm" in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_models() -> None:
    for name in ("models", "families"):
        _attach_submodules(importlib.import_module(f"{PACKAGE}.{name}"))


def _attach_submodules(package: ModuleType) -> None:
    """A failed import leaves the submodules it got to, but no longer as attributes of the package tried next."""
    for name, child in list(sys.modules.items()):
        parent, _, last = name.rpartition(".")
        if parent == package.__name__ and child is not None:
            setattr(package, last, child)


def _brings_timm(name: str) -> bool:
    package, _, module = name.partition(".")
    if package != PACKAGE:
        return name == "timm"
    return module not in ("", *LIGHT) and not module.startswith("recipes.")


class _Finder(MetaPathFinder):
    """Finds what the finders after it find; the module of the first such import is followed by the models."""

    def __init__(self) -> None:
        self.busy = threading.Lock()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.busy.locked() or not _brings_timm(name) or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, path, target)) is not None:
                # a spec may be asked for without an import, so that the loader, not this call, is what counts
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(self, spec.loader)
                return spec
        return None


class _Loader(Loader):
    """A loader after whose module the models are imported, when that is complete: no import meets half of another."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # nobody else sees this one
        if not self._finder.busy.acquire(blocking=False):
            return self._loader.exec_module(module)
        _attach_submodules(module)
        try:
            self._loader.exec_module(module)
            if self._finder in sys.meta_path:
                _import_models()
                sys.meta_path.remove(self._finder)
        finally:
            self._finder.busy.release()  # after an error the next import tries again
