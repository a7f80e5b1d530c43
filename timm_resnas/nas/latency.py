"""Latency of a space's networks, measured layer by layer and predicted for every one of them.

`LatencyTable` is a dict from `Layer` to milliseconds, for one device, number of threads, batch size and precision; a
network's latency is a line through the sum of its layers. What is measured is what a user deploys, the plain timm
network in eval and inference mode, or its graph in ONNX Runtime: some tens of networks, chosen so that together they
hold every layer, see `timing` and `onnx_timer`.

Every layer of the space is measured, except where a gene has more than 8 choices: of these 8 spread evenly are, and a
layer between them is interpolated along one axis of its shape, or along two.

>>> table = LatencyTable.measure(space, Conditions.here(batch_size=32, num_threads=1))
>>> table.save("latency.json")
>>> table.price(space)
>>> space.sample(rng, Budget(latency_ms=12))
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..arch import Arch, Layer
from .cost import Budget
from .onnx_timer import OnnxTimer
from .space import BudgetError, SearchSpace
from .tables import layers_at
from .timing import Conditions, LatencyError, LatencyTimer, device_name, run_rounds, summary

__all__ = [
    "LatencyTable",
    "cover_networks",
    "fit_line",
    "measure_network",
    "measured_layers",
    "open_timer",
    "spread_networks",
]

_FORMAT, _FORMAT_1 = "timm_resnas latency table 2", "timm_resnas latency table 1"
_MAX_CHOICES = 8  # values measured of one gene
_MAX_CANDIDATES = 4096  # combinations of widths that covering compares
_NS = 10**6  # nanoseconds of a millisecond: predictions are sums of integers, the same in any order
_TIMES = ("ms", "median_ms", "iqr", "samples")


# -- layers that were not measured ------------------------------------------------------------------------------------


class _Times:
    """Milliseconds of layers: the held ones, and between them where an axis was thinned."""

    def __init__(self, held: Mapping[Layer, float]) -> None:
        self._held = held
        self._values: dict[tuple, set[int]] = defaultdict(set)
        for layer in held:
            for axes, rest in _lines(layer):
                for i in axes:
                    self._values[rest, i].add(layer.shape[i][1])

    def at(self, layer: Layer) -> float | None:
        """The time of a layer; None where it lies between too few."""
        if layer in self._held:
            return self._held[layer]
        for axes, rest in _lines(layer):
            ends = [_ends(self._values.get((rest, i), set()), layer.shape[i][1]) for i in axes]
            total = 0.0
            for corner in itertools.product(*ends):
                shape = list(layer.shape)
                for i, (value, _) in zip(axes, corner, strict=True):
                    shape[i] = shape[i][0], value
                ms = self._held.get(Layer(layer.kind, tuple(shape)))
                if ms is None:
                    break
                total += ms * math.prod(weight for _, weight in corner)
            else:
                if all(ends):
                    return total
        return None


def _lines(layer: Layer) -> Iterator[tuple[tuple[int, ...], tuple]]:
    """One or two axes of a shape, and what is equal in all layers that differ in these only."""
    for count in (1, 2):
        for axes in itertools.combinations(range(len(layer.shape)), count):
            yield axes, (layer.kind, axes, *(p[:1] if i in axes else p for i, p in enumerate(layer.shape)))


def _ends(values: set[int], value: int) -> list[tuple[int, float]]:
    """Neighbours of a value and their weights; none outside, or on an axis that was not thinned."""
    if value in values:
        return [(value, 1.0)]
    below, above = [v for v in values if v < value], [v for v in values if v > value]
    if len(values) < _MAX_CHOICES or not below or not above:
        return []
    low, high = max(below), min(above)
    return [(low, (high - value) / (high - low)), (high, (value - low) / (high - low))]


# -- networks to measure ----------------------------------------------------------------------------------------------


def _thin(count: int) -> list[int]:
    """At most 8 indices, spread evenly, ends included."""
    return sorted(set(np.linspace(0, count - 1, min(count, _MAX_CHOICES)).round().astype(int).tolist()))


def _every_layer(space: SearchSpace) -> dict[Layer, None]:
    return {layer: None for p in space.positions for _, layer in layers_at(space.genes, p) if layer is not None}


def measured_layers(space: SearchSpace) -> list[Layer]:
    """The layers that a table of the space measures: those of thinned genes, and those not between any of them."""
    kept = [set(_thin(len(gene.choices))) for gene in space.genes]
    layers: dict[Layer, None] = {}
    for position in space.positions:
        for index, layer in layers_at(space.genes, position):
            if layer is not None and all(i in kept[g] for g, i in zip(position.genes, index, strict=True)):
                layers[layer] = None
    every = _every_layer(space)
    while True:
        times = _Times(dict.fromkeys(layers, 0.0))
        missing = [layer for layer in every if times.at(layer) is None]
        if not missing:
            return list(layers)
        layers.update(dict.fromkeys(missing))


def cover_networks(space: SearchSpace) -> list[Arch]:
    """Few networks that together hold the `measured_layers` of the space, deterministic.

    All parts are present, so that most layers come several times, at different depth.

    Raises:
        LatencyError: No network was found for a layer.
    """
    wanted = measured_layers(space)
    number: dict[Layer | None, int] = {layer: i for i, layer in enumerate(wanted)}
    cells = []  # number of the layer for each combination of a position's genes, -1: none that is wanted
    for position in space.positions:
        ids = np.full([len(space.genes[g].choices) for g in position.genes], -1)
        for index, layer in layers_at(space.genes, position):
            ids[index] = number.get(layer, -1)
        cells.append(ids)
    present = {g: 0 for g, gene in enumerate(space.genes) if gene.kind == "presence"}
    widths = [g for g, gene in enumerate(space.genes) if gene.kind == "width"]
    rng = np.random.default_rng(0)
    kept = [_thin(len(space.genes[g].choices)) for g in widths]
    if math.prod(map(len, kept)) <= _MAX_CANDIDATES:
        candidates = np.array(list(itertools.product(*kept)), int).reshape(-1 if widths else 1, len(widths))
    else:
        candidates = np.stack([rng.choice(k, _MAX_CANDIDATES) for k in kept], axis=1)

    # positions with the same layers for given widths, and these layers, [widths, the rest]
    groups: dict[tuple, list[Any]] = {}
    for position, ids in zip(space.positions, cells, strict=True):
        ids = ids[tuple(slice(0, 1) if g in present else slice(None) for g in position.genes)]
        own = [axis for axis, g in enumerate(position.genes) if g in widths]
        shape = tuple(ids.shape[axis] for axis in own)
        ids = np.moveaxis(ids, own, range(len(own))).reshape(math.prod(shape), -1)
        columns = [widths.index(position.genes[axis]) for axis in own]
        at = np.zeros(len(candidates), int)
        for column, size in zip(columns, shape, strict=True):
            at = at * size + candidates[:, column]
        groups.setdefault((*columns, ids.shape, ids.tobytes()), [0, ids, at])[0] += 1

    counts = np.zeros(len(wanted))

    def fill(fixed: Mapping[int, int]) -> np.ndarray:
        """A row with these genes; position by position, the layer that was met least."""
        row, seen = dict(fixed), counts.copy()
        for position, ids in zip(space.positions, cells, strict=True):
            options = ids[tuple(row.get(g, slice(None)) for g in position.genes)]
            flat = np.ravel(options)
            # random among equals, so that depth does not go with width
            best = int(np.argmin(np.where(flat < 0, np.inf, seen[flat] + 0.5 * rng.random(flat.size))))
            free = [g for g in position.genes if g not in row]
            row.update(zip(free, map(int, np.unravel_index(best, np.shape(options))), strict=True))
            if flat[best] >= 0:
                seen[flat[best]] += 1
        return space.normalise(np.array([[row.get(g, 0) for g in range(len(space.genes))]], np.int8))

    rows = []
    while (counts == 0).any():
        fresh = np.append(counts == 0, False)
        gain = sum(np.minimum(n, fresh[ids].sum(axis=1))[at] for n, ids, at in groups.values())
        best = candidates[int(np.argmax(gain))].tolist()
        first = int(np.argmin(counts))
        p = next(p for p, ids in enumerate(cells) if (ids == first).any())
        cell = np.argwhere(cells[p] == first)[0].tolist()
        goals = (
            {**present, **dict(zip(widths, best, strict=True))},
            {**present, **dict(zip(space.positions[p].genes, cell, strict=True))},
        )
        for fixed in goals:
            row = fill(fixed)
            found = [ids[tuple(row[0, g] for g in pos.genes)] for pos, ids in zip(space.positions, cells, strict=True)]
            found = [int(i) for i in found if i >= 0]
            if (counts[found] == 0).any():
                break
        else:
            raise LatencyError(f"no network of the space was found that holds {wanted[first]}")
        np.add.at(counts, found, 1)
        rows.append(row)
    return space.decode(np.concatenate(rows))


def spread_networks(space: SearchSpace, count: int, seed: int, avoid: Iterable[Arch] = ()) -> list[Arch]:
    """Random networks spread evenly over the space's range of MACs: one in each of ``count`` equal parts of it.

    Args:
        space: The search space.
        count: Number of parts; a part without networks gives none.
        seed: Seed of the random choices.
        avoid: Networks that are not given again, where others are found.
    """
    rng = np.random.default_rng([seed, count])
    edges = np.linspace(*space.cost_range("macs"), count + 1)
    taken = {a.key() for a in avoid}
    found: dict[str, Arch] = {}
    for low, high in itertools.pairwise(edges.tolist()):
        try:
            drawn = space.sample_many(16, rng, Budget(macs=round(high), lower=min(low / high, 1 - 1e-9)))
        except BudgetError:
            continue
        fresh = [a for a in drawn if a.key() not in taken and a.key() not in found]
        if fresh:
            found[fresh[0].key()] = fresh[0]
    return list(found.values())


def open_timer(
    space: SearchSpace, conditions: Conditions, min_run_time: float = 0.1, folder: str | os.PathLike | None = None
) -> LatencyTimer | OnnxTimer:
    """What times networks of the space in the conditions' runtime; ``folder`` is where ONNX graphs are kept.

    Raises:
        LatencyError: The conditions are of another device.
        ImportError: The runtime is not installed.
    """
    if conditions.runtime == "onnxruntime":
        return OnnxTimer(space, conditions, min_run_time, folder)
    return LatencyTimer(space, conditions, min_run_time)


def measure_network(
    arch: Any, space: SearchSpace, table: LatencyTable, *, rounds: int = 30, min_run_time: float = 0.1
) -> dict[str, float]:
    """Latency of a network of the space from end to end, in the runtime and under the conditions of the table.

    Returns:
        As `timing.measure` does.

    Raises:
        LatencyError: The table is of another space or device.
        ValueError: The network is not of the space.
    """
    arch = space.arch_type.parse(arch)
    table.check(space, device=table.conditions.device)
    space.encode(arch)
    timer = open_timer(space, table.conditions, min_run_time)
    return summary([min(timer.total(arch)) for _ in range(rounds)])


def fit_line(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, through_zero: bool = False
) -> tuple[float, float]:
    """(a, b) of the line a + b x with a >= 0 and b > 0 that has the least sum of absolute relative errors.

    Such a line passes through two of the points, or one and zero; all are tried, so that a few bad points decide
    nothing.

    Raises:
        ValueError: No points, or one that is not above zero.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not len(x) or (x <= 0).any() or (y <= 0).any():
        raise ValueError("a line through latencies needs points above zero")
    lines = [(0.0, float(v / u)) for u, v in zip(x, y, strict=True)]
    if not through_zero:
        for i, j in itertools.combinations(range(len(x)), 2):
            if x[i] != x[j] and (slope := float((y[i] - y[j]) / (x[i] - x[j]))) > 0:
                if (start := float(y[i] - slope * x[i])) > 0:
                    lines.append((start, slope))
    return min(lines, key=lambda ab: float(np.abs((ab[0] + ab[1] * x) / y - 1).sum()))


# -- the table --------------------------------------------------------------------------------------------------------


class LatencyTable:
    """Times of layers under one set of conditions, and the latency that they predict.

    Args:
        conditions: The conditions of the measurement.
        layers: Measured layers: ``dict(ms, median_ms, iqr, samples)`` of each.
        overhead_ms: Of a network, beside ``scale`` times the sum of its layers; from the calibration.
        scale: See ``overhead_ms``.
        notes: How it was made and how well it predicts, JSON-plain; kept, not read.

    Raises:
        LatencyError: A number is out of range.
    """

    def __init__(
        self,
        conditions: Conditions,
        layers: Mapping[Layer, Mapping[str, float]],
        *,
        overhead_ms: float = 0.0,
        scale: float = 1.0,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.conditions = conditions
        self.layers = dict(layers)
        self.overhead_ms = _number("overhead_ms", overhead_ms)
        self.scale = _number("scale", scale)
        if not self.scale:
            raise LatencyError("scale must be above 0")
        self.notes: dict[str, Any] = dict(notes or {})
        self._times = _Times({layer: value["ms"] for layer, value in self.layers.items()})
        self._ns: dict[Layer, int] = {}

    def __repr__(self) -> str:
        return f"LatencyTable({len(self.layers)} layers, {self.conditions})"

    def layer_ns(self, layer: Layer) -> int:
        """What a layer adds to the prediction, in nanoseconds.

        Raises:
            LatencyError: It was not measured and lies between no measured ones.
        """
        if layer not in self._ns:
            ms = self._times.at(layer)
            if ms is None:
                raise LatencyError(f"the latency table does not hold {layer}; it holds {self._held(layer.kind)}")
            self._ns[layer] = round(self.scale * ms * _NS)
        return self._ns[layer]

    def _held(self, kind: str) -> str:
        axes: dict[str, set[int]] = defaultdict(set)
        for name, value in (pair for layer in self.layers if layer.kind == kind for pair in layer.shape):
            axes[name].add(value)
        text = ", ".join(f"{n} {' '.join(map(str, sorted(v)[:_MAX_CHOICES]))}" for n, v in axes.items())
        return f"{kind} with {text}" if axes else f"no {kind}"

    @property
    def overhead_ns(self) -> int:
        """What every network has beside its layers, in nanoseconds."""
        return round(self.overhead_ms * _NS)

    def predict(self, arch: Arch, **model_args: Any) -> float:
        """Latency of one forward in milliseconds; arguments as of `Arch.layers`, a space's are ``**space.model_args``.

        Raises:
            LatencyError: The network has a layer outside of what was measured.
        """
        return (self.overhead_ns + sum(map(self.layer_ns, arch.layers(**model_args)))) / _NS

    def price(self, space: SearchSpace, **conditions: Any) -> None:
        """Give the space the cost ``latency_ms``; arguments and errors as of `check`."""
        self.check(space, **conditions)
        space.price("latency_ms", self.layer_ns, unit=_NS, base=self.overhead_ns)

    def check(self, space: SearchSpace, **conditions: Any) -> None:
        """Say why the table is not for these conditions, or does not hold a layer of the space.

        Args:
            space: The search space, with the model arguments that its networks are built with.
            **conditions: What must be the table's: any of the names of `Conditions`. ``device`` also means that this
                machine's device has the same name, and the table's runtime is installed.

        Raises:
            LatencyError: With every condition that differs, or with the layer.
            ImportError: The runtime is not installed.
        """
        own = asdict(self.conditions)
        if unknown := set(conditions) - set(own):
            raise TypeError(f"unknown condition {min(unknown)!r}; known: {', '.join(own)}")
        wrong = [(k, own[k], v) for k, v in conditions.items() if v is not None and v != own[k]]
        device = conditions.get("device")
        if device == own["device"]:
            if (name := device_name(device)) != own["device_name"]:
                wrong.append(("device_name", own["device_name"], name))
            elif not wrong:
                self.conditions.check_device()
        if wrong:
            text = "; ".join(f"{k} is {theirs!r}, the table's is {ours!r}" for k, ours, theirs in wrong)
            raise LatencyError(f"the latency table does not fit: {text}. Measure one for these conditions")
        for layer in _every_layer(space):
            self.layer_ns(layer)

    @staticmethod
    def jobs(space: SearchSpace, calibration: int = 8, seed: int = 0) -> dict[str, tuple[Arch, bool]]:
        """What `run_rounds` has to measure for a table: networks of all layers, and random ones from end to end."""
        jobs = {f"layers {i}": (arch, True) for i, arch in enumerate(cover_networks(space))}
        whole = spread_networks(space, calibration, seed)
        return jobs | {f"calibration {i}": (arch, False) for i, arch in enumerate(whole)}

    @classmethod
    def from_records(
        cls,
        space: SearchSpace,
        conditions: Conditions,
        jobs: Mapping[str, tuple[Arch, bool]],
        records: Iterable[Mapping[str, Any]],
    ) -> LatencyTable:
        """The table of the records that `run_rounds` gave for `jobs`.

        Raises:
            LatencyError: Records are missing.
        """
        wanted = set(measured_layers(space))
        rounds: dict[Layer, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        totals: dict[str, list[float]] = defaultdict(list)
        contention: list[float] = []
        for record in records:
            if record["job"] not in jobs:
                continue
            contention.append(record["contention"])
            arch, split = jobs[record["job"]]
            if not split:
                totals[record["job"]].append(record["ms"])
                continue
            for layer, ms in zip(space.layers(arch), record["ms"], strict=True):
                if layer in wanted:  # others would lie across the thinned grid
                    rounds[layer][record["round"]].append(ms)
        layers = {}
        for layer, by_round in rounds.items():
            # a layer that comes several times counts with its mean, for it is summed as often
            layers[layer] = summary([float(np.mean(ms)) for ms in by_round.values()])
            layers[layer]["samples"] = sum(map(len, by_round.values()))
        table = cls(conditions, layers)
        table.check(space)
        networks = []
        for name, (arch, split) in jobs.items():
            if not split and totals[name]:
                total = table.predict(arch, **space.model_args)
                networks.append({**arch.record(), "sum": total, **summary(totals[name])})
        if networks:
            overhead, scale = fit_line([n["sum"] for n in networks], [n["ms"] for n in networks])
            table = cls(conditions, layers, overhead_ms=overhead, scale=scale)
        table.notes = {
            "model_args": space.model_args,
            "rounds": max((len(r) for r in rounds.values()), default=0),
            "contention": round(float(np.mean(contention or [0])), 4),
            "calibration": networks,
        }
        return table

    @classmethod
    def measure(
        cls, space: SearchSpace, conditions: Conditions, *, rounds: int = 10, calibration: int = 8, seed: int = 0
    ) -> LatencyTable:
        """Measure a table on this machine; ``recipes/latency.py`` does the same with progress, resuming and a check."""
        jobs = cls.jobs(space, calibration, seed)
        return cls.from_records(space, conditions, jobs, run_rounds(open_timer(space, conditions), jobs, rounds))

    # -- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The table as text: conditions, calibration, then one line per layer."""
        head = {
            "format": _FORMAT,
            "conditions": asdict(self.conditions),
            "overhead_ms": self.overhead_ms,
            "scale": self.scale,
        }
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        rows = [
            json.dumps({"kind": layer.kind, "shape": dict(layer.shape), **self.layers[layer]})
            for layer in sorted(self.layers, key=lambda layer: (layer.kind, layer.shape))
        ]
        lines.append(' "layers": [\n  ' + ",\n  ".join(rows) + "\n ]")
        notes = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.notes.items()]
        lines.append(' "notes": {\n' + ",\n".join(notes) + "\n }")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Inverse of `to_json`; the text is checked, for it may come from the net.

        Raises:
            LatencyError: It is not a latency table; the message names what is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as e:
            raise LatencyError(f"not a latency table: not JSON ({e})") from None
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        if got == _FORMAT_1:
            raise LatencyError("measure again: the latency table is of format 1, which held parts of one family only")
        if got != _FORMAT:
            raise LatencyError(f"not a latency table of format {_FORMAT!r}, got {got!r:.60}")
        try:
            needed = {f.name for f in fields(Conditions) if f.default is MISSING}
            known = {f.name for f in fields(Conditions)}
            if not needed <= set(data["conditions"]) <= known:
                got = ", ".join(data["conditions"])
                raise LatencyError(f"conditions must have {', '.join(sorted(needed))}; got {got}")
            layers: dict[Layer, dict[str, float]] = {}
            for i, row in enumerate(data["layers"]):
                layer = _read_layer(i, row)
                if layer in layers:
                    raise LatencyError(f"layer {i} {layer} is there twice")
                layers[layer] = {k: _number(f"layer {i}: {k}", row.get(k)) for k in _TIMES}
            return cls(
                Conditions(**data["conditions"]),
                layers,
                overhead_ms=data["overhead_ms"],
                scale=data["scale"],
                notes=data.get("notes"),
            )
        except LatencyError as e:
            raise LatencyError(f"the latency table is damaged: {e}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise LatencyError(f"the latency table is damaged: {type(e).__name__} {e}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the file whole or not at all."""
        path = Path(path)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(self.to_json(), encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Read a file.

        Raises:
            LatencyError: There is none, or it is not a latency table; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise LatencyError(f"latency table {path}: {e.strerror}") from None
        except LatencyError as e:
            raise LatencyError(f"{path}: {e}") from None


def _read_layer(i: int, row: Any) -> Layer:
    kind, shape = (row.get("kind"), row.get("shape")) if isinstance(row, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(shape, dict):
        raise LatencyError(f"layer {i} must be a dict with kind and shape; got {row!r:.80}")
    for name, value in shape.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise LatencyError(f"layer {i}: {name} must be an integer, got {value!r:.40}")
    return Layer(kind, tuple(sorted(shape.items())))


def _number(what: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise LatencyError(f"{what} must be a number from 0 to 1e9, got {value!r:.40}")
    return value
