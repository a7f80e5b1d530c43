"""Latency of the ViT-ResNAS family, measured piece by piece, and predicted for every network of a space.

A network is a sequence of pieces: the stem, the attention half and the MLP half of each block, the reductions, the
head. :class:`LatencyTable` holds the time of each piece that a space can choose, for one device, number of threads,
batch size, image size and precision, and predicts a network's latency as a line through the sum of its pieces.

What is measured is what a user deploys, the plain timm network ``vit_resnas`` in eval and inference mode. A piece is
timed where it stands: some tens of networks, chosen so that together they hold every piece, run from end to end with a
time stamp between the pieces. So caches and memory are in the state that a real forward finds them in, which a piece
that is repeated on its own would never see.

Other programs only ever make a piece slower, on a rented machine those of its other tenants, too, for seconds or
minutes at a time. So the networks take turns in rounds, and the fastest repeat of all rounds counts: what the device
can do. Median and interquartile range of the rounds' fastest repeats say what it did meanwhile.

>>> table = LatencyTable.measure(SearchSpace.preset("micro"), Setting.here(batch_size=32, num_threads=1))
>>> table.save("latency.json")
>>> search = EvolutionSearch(space, Budget(latency_ms=12), extra_costs=table.costs)
>>> measure_network(search.top(1)[0], space, table)
{'ms': 11.83, 'median_ms': 11.9, 'iqr': 0.09}
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch.utils.benchmark import Timer

from ..arch import Arch, Block
from ..models.vit_resnas import TransformerBlock, VitResNas
from .cost import Budget
from .space import BudgetError, SearchSpace

__all__ = [
    "LatencyError",
    "LatencyTable",
    "Meter",
    "PRECISIONS",
    "Piece",
    "Setting",
    "cover_networks",
    "fit_line",
    "measure",
    "measure_network",
    "pieces_of",
    "run_rounds",
    "spread_networks",
    "summary",
]

_FORMAT = "timm_resnas latency table 1"
_MAX_CHOICES = 8  # values measured per axis; a network's other values lie between two of them
_NS = 10**6  # nanoseconds of a millisecond: predictions are sums of integers, the same in any order
_MIN_REPEATS, _MAX_REPEATS = 3, 1000
_TIMES = ("ms", "median_ms", "iqr", "samples")

# timm's names (its benchmark.py): the model's own type, or autocast; type of autocast and of weights and images
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    "bfloat16": (None, torch.bfloat16),
    "float16": (None, torch.float16),
    "amp_bfloat16": (torch.bfloat16, torch.float32),
    "amp": (torch.float16, torch.float32),
}
_MODEL_ARGS = ("img_size", "patch_size", "in_chans", "num_classes", "distill_token")  # that decide latency


class LatencyError(ValueError):
    """A latency table is damaged or does not fit; the message says what it is for and what was asked."""


# -- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Conditions under which latency is measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        device_name: Name of the processor or accelerator.
        num_threads: Threads of one operation on the CPU.
        batch_size: Images per forward.
        precision: Name in :data:`PRECISIONS`.
        torch: Version of torch.
    """

    device: str
    device_name: str
    num_threads: int
    batch_size: int
    precision: str
    torch: str

    def __post_init__(self) -> None:
        for name in ("device", "device_name", "precision", "torch"):
            if not isinstance(getattr(self, name), str):
                raise LatencyError(f"setting {name} must be a text, got {getattr(self, name)!r:.40}")
        for name in ("num_threads", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LatencyError(f"setting {name} must be an integer of at least 1, got {value!r:.40}")
        if self.device not in ("cpu", "cuda"):
            raise LatencyError(f"latency is measured on cpu or cuda, got device {self.device!r:.40}")
        if self.precision not in PRECISIONS:
            raise LatencyError(f"unknown precision {self.precision!r:.40}; known: {', '.join(PRECISIONS)}")

    @classmethod
    def here(
        cls, *, batch_size: int, num_threads: int | None = None, precision: str = "float32", device: str = "cpu"
    ) -> Setting:
        """The setting on this machine; ``num_threads=None`` is torch's current number."""
        threads = torch.get_num_threads() if num_threads is None else num_threads
        return cls(device, device_name(device), threads, batch_size, precision, torch.__version__)

    def __str__(self) -> str:
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.device_name} ({self.device}), {threads}, batch {self.batch_size}, {self.precision}"


def device_name(device: str) -> str:
    """Name of this machine's CPU or current CUDA device.

    Raises:
        LatencyError: There is no such device.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LatencyError("device cuda was asked for, but torch finds none on this machine")
        return torch.cuda.get_device_name()
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as f:
                return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
        except (OSError, StopIteration):
            pass  # not every architecture writes a name there
    return platform.processor() or platform.machine()


# -- pieces -----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a network whose latency depends on nothing else of the architecture.

    Attributes:
        kind: ``"stem"``, ``"attn"``, ``"mlp"``, ``"reduction"`` or ``"head"``.
        stage: Stage, from 0; a reduction is of the stage that it opens.
        dim: Embed width; of a reduction, the width that comes in.
        size: Heads, hidden units, or a reduction's width that goes out; 0 for stem and head.
        head_dim: Of attention, else 0.
    """

    kind: str
    stage: int
    dim: int
    size: int = 0
    head_dim: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in zip(_NAMES[self.kind], self, strict=True) if name}

    def __str__(self) -> str:
        rest = ", ".join(f"{k} {v}" for k, v in list(self.to_json().items())[2:])
        return f"{self.kind} of stage {self.stage} ({rest})"


_NAMES = {
    "stem": ("piece", "stage", "embed_dim", "", ""),
    "attn": ("piece", "stage", "embed_dim", "num_heads", "head_dim"),
    "mlp": ("piece", "stage", "embed_dim", "mlp_hidden", ""),
    "reduction": ("piece", "stage", "in_dim", "out_dim", ""),
    "head": ("piece", "stage", "embed_dim", "", ""),
}


def pieces_of(arch: Arch) -> list[Piece]:
    """The pieces of a network, in the order of its forward; absent blocks have none."""
    stage = 0
    pieces = [Piece("stem", 0, arch.patch_embed.dim)]
    for block in arch.blocks:
        if type(block) is not Block:
            stage += 1
            pieces.append(Piece("reduction", stage, block.in_dim, block.out_dim))
        elif block.exists:
            pieces.append(Piece("attn", stage, block.dim, block.num_heads, block.head_dim))
            pieces.append(Piece("mlp", stage, block.dim, block.mlp_hidden))
    pieces.append(Piece("head", stage, arch.head.dim))
    return pieces


def forward_pieces(net: VitResNas, x: torch.Tensor, mark: Callable[[], None]) -> torch.Tensor:
    """``net(x)`` in eval, with ``mark()`` before the first and after each of its :func:`pieces_of`."""
    mark()
    x = net._embed(x)
    mark()
    for block in net.blocks:
        if isinstance(block, TransformerBlock):
            x = x + block.drop_path1(block.attn(block.norm1(x)))
            mark()
            x = x + block.drop_path2(block.mlp(block.norm2(x)))
        else:
            x = block(x)
        mark()
    x = net.forward_head(net.norm(x))
    mark()
    return x


class _Choices(NamedTuple):
    """What a space can choose in one stage, thinned to the values that are measured."""

    dims: list[int]
    heads: list[tuple[int, int]]  # (num_heads, head_dim)
    hidden: list[int]
    num_blocks: int


def _choices(space: SearchSpace, most: int) -> list[_Choices]:
    keep = space.to_dict()["num_channels_to_keep"]
    stages: list[_Choices] = [_Choices(_thin(keep[0], most), [], [], 0)]
    heads: dict[int, set[int]] = defaultdict(set)
    hidden: set[int] = set()

    def close() -> None:
        pairs = [(n, width) for width in sorted(heads) for n in _thin(heads[width], most)]
        stages[-1] = stages[-1]._replace(heads=pairs, hidden=_thin(hidden, most))
        heads.clear()
        hidden.clear()

    for entry, choice in zip(space.largest.blocks, keep[1:-1], strict=True):
        if isinstance(entry, Block):
            heads[entry.head_dim].update(n // entry.head_dim for n in choice["attn"])
            hidden.update(choice["mlp"])
            stages[-1] = stages[-1]._replace(num_blocks=stages[-1].num_blocks + 1)
        else:
            close()
            stages.append(_Choices(_thin(choice, most), [], [], 0))
    close()
    return stages


def _thin(values: Iterable[int], most: int) -> list[int]:
    """At most so many of the values, spread evenly over their order, ends included."""
    values = sorted(set(values))
    if len(values) <= most:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int).tolist()]


def cover_networks(space: SearchSpace, max_choices: int = _MAX_CHOICES) -> list[Arch]:
    """Few networks that together hold every piece of the space, deterministic.

    All blocks are present, so that most pieces come several times, in blocks of different depth. The networks need not
    be of the space themselves: a value stands in any block of its stage.

    Args:
        space: The search space.
        max_choices: Choices of one axis that are covered; of more, so many spread evenly are.
    """
    stages = _choices(space, max_choices)
    last = len(stages) - 1
    counts: Counter[Piece] = Counter()
    widths = math.prod(len(s.dims) for s in stages)
    rng = np.random.default_rng(0)

    def wanted(dims: Sequence[int]) -> tuple[list[Piece], list[list[Piece]]]:
        single = [Piece("stem", 0, dims[0]), Piece("head", last, dims[-1])]
        single += [Piece("reduction", s, dims[s - 1], dims[s]) for s in range(1, len(dims))]
        halves = []
        for s, (dim, stage) in enumerate(zip(dims, stages, strict=True)):
            halves.append([Piece("attn", s, dim, *heads) for heads in stage.heads])
            halves.append([Piece("mlp", s, dim, hidden) for hidden in stage.hidden])
        return single, halves

    def gain(dims: Sequence[int]) -> int:
        single, halves = wanted(dims)
        new = sum(not counts[p] for p in single)
        for half, stage in zip(halves, [s for s in stages for _ in range(2)], strict=True):
            new += min(stage.num_blocks, sum(not counts[p] for p in half))
        return new

    archs = []
    while True:
        if widths <= 4096:
            paths = list(itertools.product(*(s.dims for s in stages)))
        else:
            paths = [tuple(int(rng.choice(s.dims)) for s in stages) for _ in range(4096)]
        dims = max(paths, key=gain)
        if not gain(dims):
            return archs
        single, halves = wanted(dims)
        counts.update(single)
        entries: list[tuple] = [(*space.largest.patch_embed.to_def()[:1], dims[0])]
        if space.largest.patch_embed.kind == 5:
            entries = [(5, dims[0], space.largest.patch_embed.mid_dim)]
        for s, stage in enumerate(stages):
            if s:
                entries.append((3, dims[s - 1], dims[s]))
            for _ in range(stage.num_blocks):
                # the least covered of each half; random among equals, so that depth does not go with width
                attn, mlp = (min(half, key=lambda p: (counts[p], rng.random())) for half in halves[2 * s : 2 * s + 2])
                counts.update((attn, mlp))
                entries.append((1, (dims[s], attn.size, attn.head_dim), (dims[s], mlp.size), 1))
        entries.append((2, dims[-1], space.largest.num_classes))
        archs.append(Arch.from_network_def(entries))


def spread_networks(space: SearchSpace, count: int, seed: int, avoid: Iterable[Arch] = ()) -> list[Arch]:
    """Random networks spread evenly over the space's range of MACs: one in each of ``count`` equal parts of it.

    Args:
        space: The search space.
        count: Number of parts; a part without networks gives none.
        seed: Seed of the random choices.
        avoid: Networks that are not given again, where others are found.
    """
    rng = np.random.default_rng([seed, count])
    least, most = (space.cost_model.costs(a)["macs"] for a in (space.smallest, space.largest))
    edges = np.linspace(least, most, count + 1)
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


# -- measuring --------------------------------------------------------------------------------------------------------


class Meter:
    """Times networks of one space under one setting.

    All networks share one set of random weights (latency does not depend on them), so that many can be kept ready.

    Args:
        space: Gives the arguments that networks are built with.
        setting: The conditions; the device must be this machine's.
        min_run_time: Seconds that one network is repeated for in a round, but at least three times.

    Attributes:
        waited: Share of the last measurement's time that the CPU was not ours: other programs had it.

    Raises:
        LatencyError: The setting is of another device.
    """

    def __init__(self, space: SearchSpace, setting: Setting, min_run_time: float = 0.1) -> None:
        _check_device(setting)
        self.setting = setting
        self.waited = 0.0
        self.min_run_time = min_run_time
        self._args = {k: v for k, v in space.model_args.items() if k in _MODEL_ARGS}
        self._nets: dict[str, VitResNas] = {}
        self._pool = torch.empty(0)
        self._seconds: dict[str, float] = {}
        self.network(space.largest)  # the shared weights are as many as it needs

    def network(self, arch: Arch) -> VitResNas:
        """The plain timm network in eval mode, on shared weights."""
        arch = arch.canonical()
        if arch.key() in self._nets:
            return self._nets[arch.key()]
        net = timm.create_model("vit_resnas", network_def=arch.to_network_def(), device="meta", **self._args).eval()
        params = dict(net.named_parameters())
        starts = np.cumsum([0, *(-(-p.numel() // 64) * 64 for p in params.values())]).tolist()  # aligned as torch does
        if starts[-1] > self._pool.numel():
            self._pool = torch.randn(starts[-1], generator=torch.Generator().manual_seed(0)).mul_(0.02)
            self._pool = self._pool.to(self.setting.device, PRECISIONS[self.setting.precision][1])
        state: dict[str, torch.Tensor] = {
            name: self._pool[start : start + p.numel()].view(p.shape)
            for start, (name, p) in zip(starts, params.items(), strict=False)
        }
        for name, buffer in net.named_buffers():  # batch norm's statistics
            fill = torch.ones if name.endswith("var") else torch.zeros
            dtype = self._pool.dtype if buffer.is_floating_point() else buffer.dtype
            state[name] = fill(buffer.shape, dtype=dtype, device=self.setting.device)
        net.load_state_dict(state, assign=True)
        self._nets[arch.key()] = net
        return net

    def total(self, arch: Arch) -> list[float]:
        """Milliseconds of each repeat of one round, from end to end: [repeats]."""
        net = self.network(arch)
        x = _images(net, self.setting)

        def run(mark: Callable[[], None]) -> None:
            mark()
            net(x)
            mark()

        return self._repeat(run, arch.key(), 2)[:, 0].tolist()

    def pieces(self, arch: Arch) -> np.ndarray:
        """Milliseconds of each piece of each repeat of one round: [repeats, pieces]."""
        net = self.network(arch)
        x = _images(net, self.setting)
        count = len(pieces_of(arch))
        return self._repeat(lambda mark: forward_pieces(net, x, mark), arch.key(), count + 1)

    def _repeat(self, run: Callable[[Callable[[], None]], Any], key: str, num_marks: int) -> np.ndarray:
        if key not in self._seconds:
            self._seconds[key] = float(_stamps(run, 1, num_marks, self.setting)[0].sum()) / 1e3
        ms, self.waited = _stamps(run, _repeats(self.min_run_time, self._seconds[key]), num_marks, self.setting)
        return ms


def _check_device(setting: Setting) -> None:
    if (name := device_name(setting.device)) != setting.device_name:
        raise LatencyError(f"the setting is of {setting.device_name!r}, this machine's device is {name!r}")


def _repeats(min_run_time: float, seconds: float) -> int:
    return min(max(math.ceil(min_run_time / max(seconds, 1e-9)), _MIN_REPEATS), _MAX_REPEATS)


def _images(net: torch.nn.Module, setting: Setting) -> torch.Tensor:
    height, width = net.img_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch_size, net.in_chans, height, width, generator=generator)
    return x.to(setting.device, PRECISIONS[setting.precision][1])


def _stamps(
    run: Callable[[Callable[[], None]], Any], number: int, num_marks: int, setting: Setting
) -> tuple[np.ndarray, float]:
    """Milliseconds between the marks of ``number`` runs, [number, num_marks - 1], after warming up; share waited."""
    marks: list[Any] = []
    amp = PRECISIONS[setting.precision][0]

    def mark_cpu() -> None:
        marks.append(time.perf_counter())

    def mark_cuda() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append(event)

    mark = mark_cuda if setting.device == "cuda" else mark_cpu

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(setting.device, dtype=amp, enabled=amp is not None):
            run(mark)

    # torch's timer sets the threads, warms up, keeps the garbage collector out and waits for the device
    wall, own = time.perf_counter(), time.thread_time()
    Timer("forward()", globals={"forward": forward}, num_threads=setting.num_threads).timeit(number)
    wall, own = time.perf_counter() - wall, time.thread_time() - own
    rows = [marks[i : i + num_marks] for i in range(len(marks) - number * num_marks, len(marks), num_marks)]
    if setting.device == "cuda":
        return np.array([[a.elapsed_time(b) for a, b in itertools.pairwise(row)] for row in rows]), 0.0
    return np.diff(np.array(rows), axis=1) * 1e3, max(0.0, 1 - own / wall)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Fastest, median and interquartile range of rounds, as ``dict(ms, median_ms, iqr)``."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"ms": round(float(np.min(values)), 6), "median_ms": round(middle, 6), "iqr": round(high - low, 6)}


def run_rounds(
    meter: Any,
    jobs: Mapping[str, tuple[Arch, bool]],
    num_rounds: int,
    done: Iterable[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure networks in interleaved rounds, each round in another order.

    Args:
        meter: A :class:`Meter`.
        jobs: By name a network, and whether its pieces are timed (else the whole).
        num_rounds: How often each network is measured.
        done: Records of an earlier, broken run; what they hold is not measured again.
        seed: Seed of the order.

    Yields:
        One JSON-plain record per measurement: ``job``, ``round``, ``ms``, the fastest repeat (of each piece), and
        ``waited``, see :class:`Meter`.
    """
    known = {(record["job"], record["round"]) for record in done}
    for i in range(num_rounds):
        for name in np.random.default_rng([seed, i]).permutation(list(jobs)).tolist():
            if (name, i) in known:
                continue
            arch, split = jobs[name]
            fastest = np.min(meter.pieces(arch) if split else meter.total(arch), axis=0)
            yield {"job": name, "round": i, "ms": np.round(fastest, 6).tolist(), "waited": round(meter.waited, 4)}


def measure(
    model: torch.nn.Module, setting: Setting, *, rounds: int = 30, min_run_time: float = 0.1
) -> dict[str, float]:
    """Latency of a timm model from end to end, in eval and inference mode: ``dict(ms, median_ms, iqr)``, milliseconds.

    The fastest repeat of all rounds; median and interquartile range of each round's fastest. The model is left on the
    setting's device and in its precision's type, in eval mode.

    Args:
        model: Any model with timm's ``img_size`` (height, width) and ``in_chans``.
        setting: The conditions; the device must be this machine's.
        rounds: Number of rounds.
        min_run_time: Seconds per round, but at least three repeats.

    Raises:
        LatencyError: The setting is of another device.
    """
    _check_device(setting)
    model = model.to(setting.device, PRECISIONS[setting.precision][1]).eval()
    x = _images(model, setting)

    def run(mark: Callable[[], None]) -> None:
        mark()
        model(x)
        mark()

    number = _repeats(min_run_time, float(_stamps(run, 1, 2, setting)[0].sum()) / 1e3)
    return summary([float(_stamps(run, number, 2, setting)[0].min()) for _ in range(rounds)])


def measure_network(
    arch: Arch | Any, space: SearchSpace, table: LatencyTable, *, rounds: int = 30, min_run_time: float = 0.1
) -> dict[str, float]:
    """Latency of a network of the space from end to end, under the table's conditions, as :func:`measure` gives it.

    Args:
        arch: The network, or its ``network_def``.
        space: The search space that the table is for.
        table: Gives device, threads, batch size and precision.
        rounds: See :func:`measure`; so is ``min_run_time``.

    Raises:
        LatencyError: The table is of another space or device.
        ValueError: The network is not of the space.
    """
    arch = Arch.from_network_def(arch)
    table.check(space, device=table.setting.device)
    space.check(arch)
    net = Meter(space, table.setting).network(arch)
    return measure(net, table.setting, rounds=rounds, min_run_time=min_run_time)


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit_line(x: Sequence[float], y: Sequence[float], through_zero: bool = False) -> tuple[float, float]:
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


class _Grid(NamedTuple):
    """Measured times of one kind of piece over its two axes."""

    dims: np.ndarray
    sizes: np.ndarray
    ms: np.ndarray  # [dims, sizes]

    def at(self, dim: int, size: int) -> float | None:
        """Bilinear between measured values; None outside."""
        weights = []
        for axis, value in ((self.dims, dim), (self.sizes, size)):
            if not axis[0] <= value <= axis[-1]:
                return None
            weight = np.zeros(len(axis))
            high = int(np.searchsorted(axis, value))
            if axis[high] == value:
                weight[high] = 1
            else:
                weight[high] = (value - axis[high - 1]) / (axis[high] - axis[high - 1])
                weight[high - 1] = 1 - weight[high]
            weights.append(weight)
        return float(weights[0] @ self.ms @ weights[1])


class LatencyCosts:
    """The table as extra costs of :class:`SearchSpace` and searches; ``table.costs`` is one.

    It is a sum over pieces, so that a space computes it for thousands of networks at once, see
    :class:`~timm_resnas.nas.space.AdditiveCosts`.
    """

    name = "latency_ms"
    unit = _NS

    def __init__(self, table: LatencyTable) -> None:
        self._table = table
        self.check = table.check
        self.piece = table.piece_ns

    def __call__(self, arch: Arch) -> dict[str, float]:
        return {"latency_ms": self._table.predict(arch)}


class LatencyTable:
    """Times of the pieces of a space's networks under one setting, and the latency they predict.

    Args:
        setting: The conditions of the measurement.
        model_args: The space's model arguments that decide latency.
        stem: Type and mid channels of the patch embedding.
        pieces: Measured pieces: ``dict(ms, iqr, samples)``, and ``median_ms`` where it was measured. Of each kind,
            stage and head_dim they form a full grid.
        overhead_ms: Of a network, beside ``scale`` times the sum of its pieces; from the calibration.
        scale: See ``overhead_ms``.
        notes: How it was made and how well it predicts, JSON-plain; kept, not read.

    Attributes:
        costs: ``costs(arch) -> {"latency_ms": ...}``, the ``extra_costs`` of :class:`SearchSpace` and searches.

    Raises:
        LatencyError: Pieces are missing or out of range.
    """

    def __init__(
        self,
        setting: Setting,
        model_args: Mapping[str, Any],
        stem: tuple[int, int],
        pieces: Mapping[Piece, Mapping[str, float]],
        *,
        overhead_ms: float = 0.0,
        scale: float = 1.0,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.setting = setting
        self.model_args = {k: model_args[k] for k in _MODEL_ARGS}
        self.model_args["img_size"] = _sides(self.model_args["img_size"])
        self.stem = tuple(stem)
        self.pieces = dict(pieces)
        self.overhead_ms, self.scale = float(overhead_ms), float(scale)
        self.notes: dict[str, Any] = dict(notes or {})
        if not (math.isfinite(self.overhead_ms) and self.overhead_ms >= 0):
            raise LatencyError(f"overhead_ms must be a number of at least 0, got {overhead_ms!r:.40}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise LatencyError(f"scale must be a number above 0, got {scale!r:.40}")
        self._grids = _grids(self.pieces)
        self._ns: dict[Piece, int] = {}
        self.costs = LatencyCosts(self)

    def __repr__(self) -> str:
        return f"LatencyTable({len(self.pieces)} pieces, {self.setting})"

    # -- predicting ---------------------------------------------------------------------------------------------------

    def predict(self, arch: Arch) -> float:
        """Latency of one forward in milliseconds.

        Raises:
            LatencyError: The network has a piece outside of what was measured.
        """
        ns = self._ns
        return sum(ns[p] if p in ns else self.piece_ns(p) for p in pieces_of(arch)) / _NS

    def piece_ns(self, piece: Piece) -> int:
        """What a piece adds to the prediction, in nanoseconds; the stem includes the network's overhead.

        Raises:
            LatencyError: It is outside of what was measured.
        """
        piece = Piece(*piece)
        if piece not in self._ns:
            grid = self._grids.get((piece.kind, piece.stage, piece.head_dim))
            ms = grid.at(piece.dim, piece.size) if grid else None
            if ms is None:
                have = "none of its kind"
                if grid:
                    first, *_, last = [str((int(d), int(s))) for d in grid.dims for s in grid.sizes] * 2
                    have = f"widths from {first} to {last}"
                raise LatencyError(f"the latency table does not hold {piece}; it holds {have}")
            own = self.scale * ms + (self.overhead_ms if piece.kind == "stem" else 0)
            self._ns[piece] = round(own * _NS)
        return self._ns[piece]

    def check(self, space: SearchSpace, **setting: Any) -> None:
        """Say why the table is not for this space, or not for these conditions.

        Args:
            space: The search space, with the model arguments that its networks are built with.
            **setting: Conditions that must be the table's: any of :class:`Setting`'s names. ``device`` also means that
                this machine's device has the same name.

        Raises:
            LatencyError: With every difference.
        """
        wrong = []
        own = {f.name: getattr(self.setting, f.name) for f in fields(Setting)}
        for name, value in setting.items():
            if name not in own:
                raise TypeError(f"unknown condition {name!r}; known: {', '.join(own)}")
            if value is not None and value != own[name]:
                wrong.append((name, own[name], value))
        device = setting.get("device")
        if device == self.setting.device and (name := device_name(device)) != self.setting.device_name:
            wrong.append(("device_name", self.setting.device_name, name))
        args = space.model_args
        args["img_size"] = _sides(args["img_size"])
        wrong += [(k, v, args.get(k)) for k, v in self.model_args.items() if v != args.get(k)]
        stem = (space.largest.patch_embed.kind, space.largest.patch_embed.mid_dim)
        if stem != self.stem:
            wrong.append(("patch embedding (type, mid channels)", self.stem, stem))
        if wrong:
            text = "; ".join(f"{k} is {theirs!r}, the table's is {ours!r}" for k, ours, theirs in wrong)
            raise LatencyError(f"the latency table does not fit: {text}. Measure one for these conditions")
        for piece in _all_pieces(space):
            self.piece_ns(piece)

    # -- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def jobs(cls, space: SearchSpace, calibration: int = 8, seed: int = 0) -> dict[str, tuple[Arch, bool]]:
        """What :func:`run_rounds` has to measure for a table: networks of all pieces, and some from end to end.

        Args:
            space: The search space.
            calibration: Random networks, spread over the range of MACs, that the calibration is fitted on.
            seed: Seed of the random networks.
        """
        jobs = {f"pieces {i}": (arch, True) for i, arch in enumerate(cover_networks(space))}
        whole = spread_networks(space, calibration, seed)
        return jobs | {f"calibration {i}": (arch, False) for i, arch in enumerate(whole)}

    @classmethod
    def from_records(
        cls,
        space: SearchSpace,
        setting: Setting,
        jobs: Mapping[str, tuple[Arch, bool]],
        records: Iterable[Mapping[str, Any]],
    ) -> LatencyTable:
        """The table of the records that :func:`run_rounds` gave for :meth:`jobs`.

        Raises:
            LatencyError: Records are missing.
        """
        rounds: dict[Piece, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        totals: dict[str, list[float]] = defaultdict(list)
        waits: list[float] = []
        for record in records:
            if record["job"] not in jobs:
                continue
            waits.append(record["waited"])
            arch, split = jobs[record["job"]]
            if not split:
                totals[record["job"]].append(record["ms"])
                continue
            for piece, ms in zip(pieces_of(arch), record["ms"], strict=True):
                rounds[piece][record["round"]].append(ms)
        pieces = {}
        for piece, by_round in rounds.items():
            # a piece that comes several times counts with its mean, for it is summed as often
            pieces[piece] = summary([float(np.mean(ms)) for ms in by_round.values()])
            pieces[piece]["samples"] = sum(map(len, by_round.values()))
        stem = (space.largest.patch_embed.kind, space.largest.patch_embed.mid_dim)
        args = {k: space.model_args[k] for k in _MODEL_ARGS}
        table = cls(setting, args, stem, pieces)
        networks = []
        for name, (arch, split) in jobs.items():
            if not split and totals[name]:
                measured = summary(totals[name])
                networks.append({"network_def": json.loads(arch.to_json()), "sum": table.predict(arch), **measured})
        if networks:
            x, y = ([n[k] for n in networks] for k in ("sum", "ms"))
            table = cls(setting, args, stem, pieces, **dict(zip(("overhead_ms", "scale"), fit_line(x, y), strict=True)))
        num_rounds = max((len(r) for r in rounds.values()), default=0)
        table.notes = {"rounds": num_rounds, "waited": round(float(np.mean(waits or [0])), 4), "calibration": networks}
        table.check(space)
        return table

    @classmethod
    def measure(
        cls, space: SearchSpace, setting: Setting, *, rounds: int = 10, calibration: int = 8, seed: int = 0
    ) -> LatencyTable:
        """Measure a table on this machine; ``recipes/latency.py`` does the same with progress, resuming and a check."""
        jobs = cls.jobs(space, calibration, seed)
        return cls.from_records(space, setting, jobs, run_rounds(Meter(space, setting), jobs, rounds))

    # -- files --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The table as text: conditions, calibration, then one line per piece."""
        head = {
            "format": _FORMAT,
            "setting": asdict(self.setting),
            "model_args": self.model_args,
            "stem": list(self.stem),
            "overhead_ms": self.overhead_ms,
            "scale": self.scale,
        }
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        rows = [json.dumps({**p.to_json(), **self.pieces[p]}) for p in sorted(self.pieces, key=_reading_order)]
        lines.append(' "pieces": [\n  ' + ",\n  ".join(rows) + "\n ]")
        lines.append(' "notes": ' + _lines(self.notes))
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Inverse of :meth:`to_json`; the text is checked, for it may come from the net.

        Raises:
            LatencyError: It is no latency table; the message names what is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as e:
            raise LatencyError(f"not a latency table: no JSON ({e})") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise LatencyError(f"not a latency table of format {_FORMAT!r}, got {got!r:.60}")
        try:
            known = {f.name for f in fields(Setting)}
            if set(data["setting"]) != known:
                raise LatencyError(f"setting must have {', '.join(sorted(known))}; got {', '.join(data['setting'])}")
            pieces = {}
            for i, row in enumerate(data["pieces"]):
                pieces[_piece(i, row)] = {k: _time(i, row, k) for k in _TIMES if k in row or k != "median_ms"}
            kind, mid = data["stem"]
            return cls(
                Setting(**data["setting"]),
                data["model_args"],
                (kind, mid),
                pieces,
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
            LatencyError: There is none, or it is no latency table; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise LatencyError(f"latency table {path}: {e.strerror}") from None
        except LatencyError as e:
            raise LatencyError(f"{path}: {e}") from None


def _sides(img_size: Any) -> list[int]:
    return [img_size, img_size] if isinstance(img_size, int) else list(img_size)


def _all_pieces(space: SearchSpace) -> list[Piece]:
    """Every piece of the space's networks, without thinning."""
    stages = _choices(space, sys.maxsize)
    pieces = [Piece("stem", 0, dim) for dim in stages[0].dims]
    for s, stage in enumerate(stages):
        if s:
            pieces += [Piece("reduction", s, a, b) for a in stages[s - 1].dims for b in stage.dims]
        for dim in stage.dims:
            pieces += [Piece("attn", s, dim, *heads) for heads in stage.heads]
            pieces += [Piece("mlp", s, dim, hidden) for hidden in stage.hidden]
    return pieces + [Piece("head", len(stages) - 1, dim) for dim in stages[-1].dims]


def _grids(pieces: Mapping[Piece, Mapping[str, float]]) -> dict[tuple[str, int, int], _Grid]:
    groups: dict[tuple[str, int, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for piece, value in pieces.items():
        groups[piece.kind, piece.stage, piece.head_dim][piece.dim, piece.size] = value["ms"]
    grids = {}
    for (kind, stage, head_dim), cells in groups.items():
        dims, sizes = (sorted(set(axis)) for axis in zip(*cells, strict=True))
        for dim, size in itertools.product(dims, sizes):
            if (dim, size) not in cells:
                raise LatencyError(f"{Piece(kind, stage, dim, size, head_dim)} is missing")
        ms = np.array([[cells[d, s] for s in sizes] for d in dims], np.float64)
        grids[kind, stage, head_dim] = _Grid(np.array(dims), np.array(sizes), ms)
    return grids


def _reading_order(piece: Piece) -> tuple:
    order = {"stem": (0, 0), "head": (2, 0), "reduction": (1, 0), "attn": (1, 1), "mlp": (1, 2)}[piece.kind]
    return order[0], piece.stage, order[1], piece.head_dim, piece.dim, piece.size


def _piece(i: int, row: Any) -> Piece:
    kind = row.get("piece") if isinstance(row, dict) else None
    if kind not in _NAMES:
        raise LatencyError(f"piece {i} must be a dict with piece one of {', '.join(_NAMES)}; got {row!r:.80}")
    values: list[Any] = [kind]
    for name in _NAMES[kind][1:]:
        value = row.get(name) if name else 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 16:
            raise LatencyError(f"piece {i}: {name} must be an integer from 0 to {1 << 16}, got {value!r:.40}")
        values.append(value)
    return Piece(*values)


def _time(i: int, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise LatencyError(f"piece {i}: {name} must be a number of at least 0, got {value!r:.40}")
    return value


def _lines(notes: Mapping[str, Any]) -> str:
    """JSON with one line per entry, and per item of a list of dicts."""
    parts = []
    for key, value in notes.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n   " + ",\n   ".join(map(json.dumps, value)) + "\n  ]"
        else:
            text = json.dumps(value)
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n }" if parts else "{}"
