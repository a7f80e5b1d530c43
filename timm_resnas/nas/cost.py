"""Budgets on what a network costs, and costs as a person reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from ..arch import Layer

__all__ = ["Budget", "BudgetError", "budget_violation", "describe_layers", "format_cost"]

_NAMES = ("macs", "params", "latency_ms", "memory")
_KINDS = {"macs": "count", "params": "count", "latency_ms": "time", "memory": "bytes"}
_UNITS: dict[str, dict[str, Any]] = {
    "count": {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12},
    "time": {"": 1, "ms": 1, "us": Decimal("0.001"), "s": 1000},
    "bytes": {"": 1, "b": 1}
    | {p + e: 10**n for p, n in (("k", 3), ("m", 6), ("g", 9)) for e in ("", "b")}
    | {p + "ib": 2**n for p, n in (("k", 10), ("m", 20), ("g", 30))},
}


class BudgetError(ValueError):
    """A budget that a space cannot meet; the message gives the range that it can."""


class Budget:
    """Upper limits on an architecture's cost; the first-named also has a lower band.

    ``Budget(macs=1.8e9, latency_ms=12)`` allows at most 1.8 GMACs and 12 ms, and at least ``lower`` times 1.8 GMACs:
    the paper searches in the band from 0.975 of the limit to the limit. ``lower=0`` leaves the lower end open.

    Args:
        lower: Lower end of the band, as a fraction of the first-named limit.
        **limits: ``macs``, ``params``, ``latency_ms`` (milliseconds), ``memory`` (bytes), in order of importance.

    Raises:
        ValueError: No limit, an unknown one, or a number out of range.
    """

    __slots__ = ("limits", "lower")

    limits: dict[str, int | float]
    lower: float

    def __init__(self, *, lower: float = 0.975, **limits: int | float) -> None:
        if not limits:
            raise ValueError(f"a budget needs at least one limit; known: {', '.join(_NAMES)}")
        clean: dict[str, int | float] = {}
        for name, value in limits.items():
            if name not in _NAMES:
                raise ValueError(f"unknown budget limit {name!r}; known: {', '.join(_NAMES)}")
            clean[name] = _number(name, value)
            if clean[name] <= 0:
                raise ValueError(f"budget limit {name} must be above 0, got {value!r}")
        lower = _number("lower", lower)
        if not 0 <= lower < 1:
            raise ValueError(f"the budget's lower must be at least 0 and below 1 (of the limit), got {lower!r}")
        object.__setattr__(self, "limits", clean)
        object.__setattr__(self, "lower", lower)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Budget does not change; make a new one instead of setting {name}")

    def __reduce__(self) -> tuple:
        return Budget.from_dict, (self.to_dict(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and list(self) == list(other) and self.lower == other.lower

    def __hash__(self) -> int:
        return hash((tuple(self), self.lower))

    def __iter__(self) -> Iterator[tuple[str, int | float]]:
        return iter(self.limits.items())

    @classmethod
    def parse(cls, text: str, share_of: Mapping[str, int | float] | None = None) -> Budget:
        """Read ``"macs=1.8G,latency=12ms"``.

        Counts take K, M, G, T; ``latency`` takes us, ms, s (bare: ms); ``memory`` takes KB, MB, GB (powers of 1000) and
        KiB, MiB, GiB; ``lower=0.95`` sets the band. ``macs=40%`` is a share of ``share_of["macs"]``, such as the
        largest network's.

        Raises:
            ValueError: The part of the text that cannot be read, and what was expected there.
        """
        limits: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (x.strip() for x in part.partition("="))
            name = {"latency": "latency_ms"}.get(name.lower(), name.lower())
            if not equals or name not in (*_NAMES, "lower"):
                raise ValueError(
                    f"budget {text!r}: cannot read {part.strip()!r}; expected name=value with a name of macs, params, "
                    f"latency, memory or lower, as in 'macs=1.8G,latency=12ms'"
                )
            if name in limits:
                raise ValueError(f"budget {text!r}: {name} is given twice")
            units: dict[str, Any] = dict(_UNITS[_KINDS[name]]) if name != "lower" else {"": 1}
            if share_of is not None and name in share_of:
                units["%"] = Decimal(share_of[name]) / 100
            match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]{1,3})?)\s*([a-z]*|%)", value.lower())
            try:
                number = Decimal(match[1]) * units[match[2]]  # type: ignore[index]  # None is a TypeError
            except (TypeError, KeyError, InvalidOperation):
                known = ", ".join(u for u in units if u) or "none"
                raise ValueError(f"budget {text!r}: cannot read {value!r}; expected a number, units: {known}") from None
            if number > 1e18:  # also what float cannot hold
                raise ValueError(f"budget {text!r}: {value} is beyond what any network costs")
            limits[name] = float(number) if name in ("latency_ms", "lower") else int(number)
        return cls(**limits)

    @property
    def first(self) -> str:
        """Name of the limit that carries the lower band."""
        return next(iter(self.limits))

    @property
    def band(self) -> tuple[float, int | float]:
        """Lower and upper end for the first-named cost."""
        limit = self.limits[self.first]
        return self.lower * limit, limit

    def check(self, costs: Mapping[str, int | float]) -> list[str]:
        """Names of the limits that these costs miss; empty when within budget.

        Raises:
            ValueError: A limited cost is not in ``costs``.
        """
        failed = []
        for i, (name, limit) in enumerate(self.limits.items()):
            if name not in costs:
                raise ValueError(f"the budget limits {name}, but only these costs are known: {', '.join(costs)}")
            cost = costs[name]
            # written so that NaN fails
            if not (cost <= limit and (i > 0 or cost >= self.lower * limit)):
                failed.append(name)
        return failed

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form: the limits in order, and ``lower``."""
        return {**self.limits, "lower": self.lower}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: Not a mapping of known limits to numbers.
        """
        if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
            raise ValueError(f"a budget must be a mapping of limits to numbers, got {data!r:.80}")
        return cls(**data)

    def __str__(self) -> str:
        parts = []
        for i, (name, limit) in enumerate(self.limits.items()):
            low = f"{format_cost(name, self.lower * limit)} to " if i == 0 and self.lower else "at most "
            parts.append(f"{name.removesuffix('_ms')} {low}{format_cost(name, limit)}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"


def budget_violation(budget: Budget | None, costs: Mapping[str, int | float]) -> float:
    """By how much costs miss a budget: the sum of the excesses, each as a fraction of its limit; 0 is within."""
    if budget is None:
        return 0.0
    floor, limit = budget.band
    below = max(0.0, (floor - costs[budget.first]) / limit)
    return below + sum(max(0.0, costs[name] / limit - 1) for name, limit in budget)


def describe_layers(layers: Iterable[Layer]) -> str:
    """A network as a Markdown table: neighbouring attention and MLP layers of one width share a row."""
    runs: list[tuple[Any, list[Layer]]] = []
    for layer in layers:
        shape = dict(layer.shape)
        block = layer.kind in ("attention", "mlp")
        key = (shape.get("tokens"), shape.get("dim")) if block else object()
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(layer)
    rows = ["| layers | shape | MACs | parameters |", "|---|---|---|---|"]
    for _, run in runs:
        kinds = [layer.kind for layer in run]
        counts = [f"{kinds.count(k)} {k}" if len(run) > 1 else k for k in dict.fromkeys(kinds)]
        shapes: dict[str, list[int]] = {}
        for layer in run:
            for name, value in layer.shape:
                if not name.startswith("params_"):  # only tells layers of one form apart
                    shapes.setdefault(name, []).append(value)
        texts = [f"{n} {v[0] if len(set(v)) == 1 else ' '.join(map(str, v))}" for n, v in shapes.items()]
        macs, params = (sum(getattr(layer, n) for layer in run) for n in ("macs", "params"))
        rows.append(f"| {', '.join(counts)} | {', '.join(texts)} | {macs:,} | {params:,} |")
    return "\n".join(rows)


def format_cost(name: str, value: float) -> str:
    """A cost as a person reads it: ``1.782G``, ``12 ms``, ``3.61 MB``."""
    if name == "latency_ms":
        return f"{value:.4g} ms"
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.5g}" + (f" {unit}B" if name == "memory" else unit)
    return f"{value:.5g}" + (" B" if name == "memory" else "")


def _number(name: str, value: Any) -> int | float:
    """A finite Python number; counts become integers."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"budget: {name} must be a finite number, got {value!r:.40}")
    return value if name in ("latency_ms", "lower") else int(value)
