"""Limits of what a constructor may make while it builds a network from a stranger's arguments."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from .errors import HubError

__all__ = ["SmallTensors", "bounded"]

_MAX_MODULES = 6_000  # timm's largest number is 2,300
_MAX_ELEMENTS = 1 << 23  # of one tensor that a constructor makes in memory, or of indices
_MAX_TENSOR = 1 << 28  # elements of one tensor, made on meta
_MAX_SECONDS = 30.0


@contextlib.contextmanager
def bounded(where: str, max_params: int) -> Iterator[None]:
    """Stop a constructor of this thread that makes too many parameters or modules, or large tensors in memory."""
    thread, begin = threading.get_ident(), time.monotonic()
    params = modules = 0

    def on_tensor(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal params
        if threading.get_ident() != thread or tensor is None:
            return
        params += tensor.numel()
        if params > max_params:
            raise HubError(f"{where} describes a network of more than {max_params:,} parameters (max_params)")

    def on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() != thread:
            return
        modules += 1
        if modules > _MAX_MODULES:
            raise HubError(f"{where} describes a network of more than {_MAX_MODULES:,} layers")
        if time.monotonic() - begin > _MAX_SECONDS:
            raise HubError(f"{where} describes a network that takes longer than {_MAX_SECONDS:g} s to build")

    handles = [
        hooks.register_module_parameter_registration_hook(on_tensor),
        hooks.register_module_buffer_registration_hook(on_tensor),
        hooks.register_module_module_registration_hook(on_module),
    ]
    try:
        with SmallTensors(where):
            yield
    finally:
        for handle in handles:
            handle.remove()


class SmallTensors(TorchDispatchMode):
    """Refuses operations that would make a large tensor in memory; their size is found on meta first."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func is torch.ops.aten._local_scalar_dense.default:  # frequent, and no memory
            return func(*args, **kwargs)
        tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, torch.Tensor)]
        device = kwargs.get("device")
        real = any(t.device.type != "meta" for t in tensors) if device is None else device.type != "meta"
        if real or not tensors and device is None:
            self._check(self._rehearse(func, args, kwargs), _MAX_ELEMENTS)
        out = func(*args, **kwargs)
        self._check(out, _MAX_TENSOR)
        return out

    def _check(self, outputs: Any, limit: int) -> None:
        for made in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if not isinstance(made, torch.Tensor):
                continue
            # timm fills tables of indices in loops of Python, on meta, too
            most = min(limit, _MAX_ELEMENTS) if made.dtype in (torch.int32, torch.int64) else limit
            if made.numel() > most:
                raise HubError(
                    f"{self.where} describes a network with a tensor of {made.numel():,} numbers; at most {most:,} "
                    f"are expected there"
                )

    @staticmethod
    def _rehearse(func: Callable, args: tuple, kwargs: dict) -> Any:
        def to_meta(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return value

        meta_args, meta_kwargs = tree_map(to_meta, (args, dict(kwargs)))
        makes = not any(isinstance(a, torch.Tensor) for a in tree_iter((args, kwargs)))
        if makes or "device" in meta_kwargs:
            meta_kwargs["device"] = torch.device("meta")
        try:
            return func(*meta_args, **meta_kwargs)
        except Exception:
            # sizes that depend on values are those of the inputs, which were small; else (randperm), a number says it
            sizes = [a for a in tree_iter(args) if isinstance(a, int)]
            return torch.empty(max(sizes), device="meta") if makes and sizes else None
