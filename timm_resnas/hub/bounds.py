"""Limits of what a constructor may make and how long it may take while it builds a network from a stranger's arguments.

Which constructor it is, and what it does with a number, is not known here; what it can use up is: parameters and
modules are counted as they are registered, the size of a tensor is found before it is made, and a watch ends the
constructor when it has used too much time or memory, whatever it is doing in Python.
"""

import contextlib
import ctypes
import os
import sys
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

if sys.platform == "linux":
    import resource

__all__ = ["SmallTensors", "bounded"]

_MAX_MODULES = 5_000  # timm's largest number is 2,300
_MAX_ELEMENTS = 1 << 23  # of one tensor that a constructor makes in memory, or of indices
_MAX_TENSOR = 1 << 28  # elements of one tensor, made on meta
_MAX_SECONDS = 10.0  # of the processor; timm's slowest constructor takes one or two
_MAX_BYTES = 1 << 30  # of memory beside what the process had
_HARD_BYTES = 2 << 30  # of address space, where the system can refuse them
_LOOK = 0.05  # seconds


@contextlib.contextmanager
def bounded(where: str, max_params: int) -> Iterator[None]:
    """Stop a constructor of this thread that makes too much or takes too long.

    Args:
        where: What messages call the description that it builds from.
        max_params: The most parameters it may make.

    Raises:
        HubError: It would make too many parameters or modules, or too large a tensor, or use too much time or memory.
    """
    thread = threading.get_ident()
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

    handles = [
        hooks.register_module_parameter_registration_hook(on_tensor),
        hooks.register_module_buffer_registration_hook(on_tensor),
        hooks.register_module_module_registration_hook(on_module),
    ]
    watch = _Watch()
    try:
        with SmallTensors(where):
            yield
    except _Stop:
        pass
    except MemoryError:
        raise HubError(f"{where} describes a network that needs too much memory to build") from None
    finally:
        for handle in handles:
            handle.remove()
        watch.end()
    if watch.why is not None:
        raise HubError(f"{where} describes a network that {watch.why}")


class _Stop(BaseException):
    """What the watch raises in the thread that it watches; a constructor that catches every Exception lets it pass."""


class _Watch:
    """Ends the thread's work, at its next step in Python, when it has used too much processor time or memory.

    A single call into C is not interrupted; where the system can refuse memory (Linux) and no other thread would
    suffer, a larger allocation than `_HARD_BYTES` fails there at once.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self._thread = threading.get_ident()
        self._begin, self._memory = _seconds_of(self._thread), _resident()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._limits: tuple[int, int] | None = None
        alone = threading.active_count() == 1
        self._watcher = threading.Thread(target=self._run, name="bounded", daemon=True)
        self._watcher.start()
        if alone and sys.platform == "linux":
            self._limits = resource.getrlimit(resource.RLIMIT_AS)
            limit = _address_space() + _HARD_BYTES
            if self._limits[0] == resource.RLIM_INFINITY or limit < self._limits[0]:
                resource.setrlimit(resource.RLIMIT_AS, (limit, self._limits[1]))

    def end(self) -> None:
        try:
            with self._lock:
                self._over.set()
            if self.why is not None:  # one more, so that none is left to arrive later
                _raise_in(self._thread, _Stop)
                while True:
                    pass
        except _Stop:
            self._over.set()
        finally:
            if self._limits is not None:
                resource.setrlimit(resource.RLIMIT_AS, self._limits)
            self._watcher.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK):
            if _seconds_of(self._thread) - self._begin > _MAX_SECONDS:
                why = f"takes longer than {_MAX_SECONDS:g} s to build"
            elif _resident() - self._memory > _MAX_BYTES:
                why = f"needs more than {_MAX_BYTES >> 20:,} MB of memory to build"
            else:
                continue
            with self._lock:
                if not self._over.is_set():
                    self.why = why
                    _raise_in(self._thread, _Stop)  # again, should it have been caught


def _raise_in(thread: int, error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _seconds_of(thread: int) -> float:
    """Processor time of a thread; where the system does not tell it, time."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


def _pages(field: int) -> int:
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def _address_space() -> int:
    return _pages(0)


def _resident() -> int:
    return _pages(1)


class SmallTensors(TorchDispatchMode):
    """Refuses operations that would make a large tensor in memory; their size is found on meta first."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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
            # timm fills tables of indices in loops of Python, on meta as well
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
