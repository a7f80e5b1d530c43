"""Whether tensors are those, with the values, that something was computed from."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

__all__ = ["Unchanged"]


class Unchanged:
    """Remembers tensors, and how often torch has counted a change in place of each.

    Those of a copy are other tensors, also where their counters, which start anew, say the same; a copy knows none.

    Args:
        tensors: What something is computed from.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._seen = [(weakref.ref(t), _version(t)) for t in tensors]

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether these are the same, unchanged."""
        tensors = list(tensors)
        return len(tensors) == len(self._seen) and all(
            ref() is t and version == _version(t) for t, (ref, version) in zip(tensors, self._seen, strict=True)
        )

    def __reduce__(self) -> tuple:
        return Unchanged, ((),)


def _version(tensor: torch.Tensor) -> int:
    # what was made in inference mode has no version, and is not trained
    return 0 if tensor.is_inference() else tensor._version
