"""Times of networks and of their layers, measured in place under stated conditions.

A layer is timed where it stands: the network runs from end to end, and forward pre-hooks take a time stamp where each
layer begins (`layer_starts`). So caches and memory are in the state that a real forward finds them in, which a layer
that is repeated on its own would never see.

Other programs only ever make a network slower, on a rented machine those of its other tenants as well, for seconds or
minutes at a time. So networks take turns in rounds (`run_rounds`), and the fastest repeat of all rounds counts: what
the device can do. Median and interquartile range of the rounds' fastest repeats say what it did meanwhile.

>>> net = timm.create_model("vit_tiny_patch16_224")
>>> measure(net, Conditions.here(batch_size=1, num_threads=1))
{'ms': 23.1, 'median_ms': 23.4, 'iqr': 0.3}
"""

from __future__ import annotations

import itertools
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from .onnx import CPU_PROVIDER, package

if TYPE_CHECKING:
    from ..arch import Arch
    from .space import SearchSpace

__all__ = [
    "Conditions",
    "LatencyError",
    "LatencyTimer",
    "PRECISIONS",
    "RUNTIMES",
    "device_name",
    "images_of",
    "layer_starts",
    "measure",
    "measure_layers",
    "measure_together",
    "repeat_call",
    "repeats",
    "run_rounds",
    "summary",
]

_MIN_REPEATS, _MAX_REPEATS = 3, 1000
_ALIGNMENT = 64  # weights; torch aligns to 64 bytes

# timm's names (its benchmark.py): the model's own type, or autocast; type of autocast and of weights and images
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    "bfloat16": (None, torch.bfloat16),
    "float16": (None, torch.float16),
    "amp_bfloat16": (torch.bfloat16, torch.float32),
    "amp": (torch.float16, torch.float32),
}


RUNTIMES = ("torch", "onnxruntime")


class LatencyError(ValueError):
    """Latency cannot be measured or predicted; the message says what was asked and what there is."""


# -- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """Conditions under which latency is measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        device_name: Name of the processor or accelerator.
        num_threads: Threads of one operation on the CPU.
        batch_size: Images per forward.
        precision: Name in `PRECISIONS`.
        torch: Version of torch.
        runtime: What runs the network: ``"torch"``, or ``"onnxruntime"`` (on the CPU, in float32).
        provider: ONNX Runtime's execution provider.
        onnxruntime: Its version.

    Raises:
        LatencyError: A value is of the wrong type or out of range.
    """

    device: str
    device_name: str
    num_threads: int
    batch_size: int
    precision: str
    torch: str
    runtime: str = "torch"
    provider: str | None = None
    onnxruntime: str | None = None

    def __post_init__(self) -> None:
        for name in ("device", "device_name", "precision", "torch"):
            if not isinstance(getattr(self, name), str):
                raise LatencyError(f"condition {name} must be a text, got {getattr(self, name)!r:.40}")
        for name in ("num_threads", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LatencyError(f"condition {name} must be an integer of at least 1, got {value!r:.40}")
        if self.device not in ("cpu", "cuda"):
            raise LatencyError(f"latency is measured on cpu or cuda, got device {self.device!r:.40}")
        if self.precision not in PRECISIONS:
            raise LatencyError(f"unknown precision {self.precision!r:.40}; known: {', '.join(PRECISIONS)}")
        if self.runtime not in RUNTIMES:
            raise LatencyError(f"unknown runtime {self.runtime!r:.40}; known: {', '.join(RUNTIMES)}")
        texts = (self.provider, self.onnxruntime)
        if self.runtime == "torch":
            if texts != (None, None):
                raise LatencyError(f"provider and onnxruntime are conditions of ONNX Runtime, got {texts!r:.80}")
        elif not all(isinstance(text, str) for text in texts):
            raise LatencyError(f"provider and onnxruntime must be texts, got {texts!r:.80}")
        elif (self.device, self.precision) != ("cpu", "float32"):
            raise LatencyError(
                f"ONNX Runtime is measured on the cpu in float32, got {self.device} and {self.precision}"
            )

    @classmethod
    def here(
        cls,
        *,
        batch_size: int,
        num_threads: int | None = None,
        precision: str = "float32",
        device: str = "cpu",
        runtime: str = "torch",
    ) -> Conditions:
        """Conditions on this machine; ``num_threads=None`` is torch's current number.

        Raises:
            ImportError: ONNX Runtime is not installed.
        """
        threads = torch.get_num_threads() if num_threads is None else num_threads
        onnx = (CPU_PROVIDER, package("onnxruntime").__version__) if runtime == "onnxruntime" else ()
        return cls(device, device_name(device), threads, batch_size, precision, torch.__version__, runtime, *onnx)

    def check_device(self) -> None:
        """Say when this machine's device is another one.

        Raises:
            LatencyError: With both names.
            ImportError: The runtime is not installed.
        """
        if (name := device_name(self.device)) != self.device_name:
            raise LatencyError(f"the conditions are of {self.device_name!r}, this machine's device is {name!r}")
        if self.runtime == "onnxruntime":
            package("onnxruntime")

    def __str__(self) -> str:
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        text = f"{self.device_name} ({self.device}), {threads}, batch {self.batch_size}, {self.precision}"
        return text if self.runtime == "torch" else f"{text}, ONNX Runtime {self.onnxruntime} ({self.provider})"


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


# -- where layers begin -----------------------------------------------------------------------------------------------


def layer_starts(net: nn.Module) -> list[nn.Module]:
    """The modules at whose entry a layer begins, in the order of the forward, one for each layer of the network.

    A network's own method ``layer_starts()`` decides. Else, as in most of timm's vision transformers: the patch
    embedding; attention and MLP of each pre-norm block, or a block of another form as a whole; the final norm.

    Raises:
        LatencyError: The network has another form and no such method.
    """
    if hasattr(net, "layer_starts"):
        return list(net.layer_starts())
    missing = [name for name in ("patch_embed", "blocks", "norm") if not hasattr(net, name)]
    if missing:
        raise LatencyError(
            f"a {type(net).__name__} has no {' and no '.join(missing)}, so it is not known where its layers begin; "
            f"define layer_starts() in its class"
        )
    starts = [net.patch_embed]
    for block in (*net.blocks, *getattr(net, "blocks_token_only", ())):  # CaiT's blocks with class attention
        if _is_pre_norm(block):
            there = [not getattr(getattr(block, name, None), "absent", False) for name in ("attn", "mlp")]
            starts += [norm for norm, kept in zip((block.norm1, block.norm2), there, strict=True) if kept]
        elif not isinstance(block, nn.Identity):  # an absent block
            starts.append(block)
    return [*starts, net.norm]


def _is_pre_norm(block: nn.Module) -> bool:
    # blocks that normalise after attention have norm1 and norm2 as well, but not in front
    return hasattr(block, "norm2") and next(block.children()) is getattr(block, "norm1", None)


# -- stamps -----------------------------------------------------------------------------------------------------------


def _stamps(
    net: nn.Module, x: torch.Tensor, starts: Sequence[nn.Module] | None, number: int, conditions: Conditions
) -> tuple[np.ndarray, float]:
    """Milliseconds of each part of ``number`` forwards, [number, parts], after warming up; and the contention.

    Without ``starts`` the forward is one part. With them a part lasts from the entry of its module to that of the next;
    what a network does before the first belongs to none.
    """
    marks: list[tuple[int, Any]] = []
    amp = PRECISIONS[conditions.precision][0]

    def mark_cpu(i: int) -> None:
        marks.append((i, time.perf_counter()))

    def mark_cuda(i: int) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((i, event))

    mark = mark_cuda if conditions.device == "cuda" else mark_cpu
    count = 1 if starts is None else len(starts)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(conditions.device, dtype=amp, enabled=amp is not None):
            if starts is None:
                mark(0)
            net(x)
            mark(count)

    def hook(i: int) -> Callable[..., None]:
        return lambda *_: mark(i)

    handles = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(starts or ())]
    try:
        # torch's timer sets the threads, warms up, keeps the garbage collector out and waits for the device
        wall, own = time.perf_counter(), time.thread_time()
        Timer("forward()", globals={"forward": forward}, num_threads=conditions.num_threads).timeit(number)
        wall, own = time.perf_counter() - wall, time.thread_time() - own
    finally:
        for handle in handles:
            handle.remove()
    order = list(range(count + 1))
    forwards = len(marks) // (count + 1)
    if [i for i, _ in marks] != order * forwards:
        raise LatencyError(
            f"the layers of a {type(net).__name__} do not begin one after the other, once each: its forward entered "
            f"parts {[i for i, _ in marks][: 2 * count]} of 0 to {count - 1} ({count}: end); correct layer_starts()"
        )
    rows = [[t for _, t in marks[i : i + count + 1]] for i in range(0, len(marks), count + 1)][-number:]
    if conditions.device == "cuda":
        return np.array([[a.elapsed_time(b) for a, b in itertools.pairwise(row)] for row in rows]), 0.0
    return np.diff(np.array(rows), axis=1) * 1e3, max(0.0, 1 - own / wall)


def repeat_call(call: Callable[[], Any], number: int, num_threads: int = 1) -> tuple[np.ndarray, float]:
    """Milliseconds of each of ``number`` calls that end when their work is done, after warming up; and the contention.

    Args:
        call: What is timed.
        number: How often.
        num_threads: torch's threads meanwhile.
    """
    seconds: list[float] = []

    def timed() -> None:
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)

    wall, own = time.perf_counter(), time.thread_time()
    Timer("timed()", globals={"timed": timed}, num_threads=num_threads).timeit(number)
    wall, own = time.perf_counter() - wall, time.thread_time() - own
    return np.array(seconds[-number:]) * 1e3, max(0.0, 1 - own / wall)


def repeats(min_run_time: float, seconds: float) -> int:
    """How many calls of so many seconds make a round of ``min_run_time`` seconds: 3 to 1000."""
    return min(max(math.ceil(min_run_time / max(seconds, 1e-9)), _MIN_REPEATS), _MAX_REPEATS)


def images_of(net: nn.Module, conditions: Conditions) -> torch.Tensor:
    """Random images of the network's size, [B, C, H, W]."""
    cfg = getattr(net, "pretrained_cfg", None) or {}
    size = getattr(net, "img_size", None) or getattr(getattr(net, "patch_embed", None), "img_size", None)
    chans, *sides = cfg.get("input_size") or (3, 224, 224)
    height, width = size or sides
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(conditions.batch_size, getattr(net, "in_chans", chans), height, width, generator=generator)
    return x.to(conditions.device, PRECISIONS[conditions.precision][1])


def summary(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Fastest, median and interquartile range of rounds, as ``dict(ms, median_ms, iqr)``."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"ms": round(float(np.min(values)), 6), "median_ms": round(middle, 6), "iqr": round(high - low, 6)}


# -- one network ------------------------------------------------------------------------------------------------------


def measure(
    model: nn.Module, conditions: Conditions, *, rounds: int = 30, min_run_time: float = 0.1
) -> dict[str, float]:
    """Latency of a timm model from end to end, in eval and inference mode: ``dict(ms, median_ms, iqr)``, milliseconds.

    The fastest repeat of all rounds; median and interquartile range of each round's fastest. The model is left on the
    conditions' device and in their precision's type, in eval mode.

    Args:
        model: Any timm model; its image size is read from ``img_size``, ``patch_embed.img_size`` or ``pretrained_cfg``.
        conditions: The conditions; the device must be this machine's.
        rounds: Number of rounds.
        min_run_time: Seconds per round, but at least three repeats.

    Raises:
        LatencyError: The conditions are of another device.
    """
    return summary(_rounds(model, None, conditions, rounds, min_run_time)[:, 0])


def measure_layers(
    model: nn.Module, conditions: Conditions, *, rounds: int = 30, min_run_time: float = 0.1
) -> dict[str, dict[str, float]]:
    """Latency of each layer of a timm model where it stands, by the name of the module that it begins with.

    In the order of the forward; values and arguments as of `measure`.

    Raises:
        LatencyError: See `measure` and `layer_starts`.
    """
    starts = layer_starts(model)
    names = {module: name for name, module in model.named_modules()}
    fastest = _rounds(model, starts, conditions, rounds, min_run_time)
    return {names[module]: summary(column) for module, column in zip(starts, fastest.T, strict=True)}


def measure_together(
    models: Mapping[str, nn.Module], conditions: Conditions, *, rounds: int = 15, min_run_time: float = 0.02
) -> dict[str, dict[str, float]]:
    """Latency of timm models that take turns: by name ``dict(ms, speedup)``.

    Medians over the rounds, of each round's fastest repeat and of the first model's time divided by it: what else runs
    on the machine weighs on all of a round alike.

    Args:
        models: The first is what the others are compared with.
        conditions: As of `measure`.
        rounds: Number of rounds.
        min_run_time: Seconds per model and round, but at least three repeats.

    Raises:
        LatencyError: See `measure`.
    """
    each = [
        [measure(model, conditions, rounds=1, min_run_time=min_run_time)["ms"] for model in models.values()]
        for _ in range(rounds)
    ]
    ms = np.array(each)  # [rounds, models]
    medians, speedups = np.median(ms, axis=0), np.median(ms[:, :1] / ms, axis=0)
    return {n: {"ms": float(m), "speedup": float(s)} for n, m, s in zip(models, medians, speedups, strict=True)}


def _rounds(
    model: nn.Module, starts: Sequence[nn.Module] | None, conditions: Conditions, rounds: int, min_run_time: float
) -> np.ndarray:
    """Fastest repeat of each part in each round, [rounds, parts]."""
    conditions.check_device()
    model = model.to(conditions.device, PRECISIONS[conditions.precision][1]).eval()
    x = images_of(model, conditions)
    number = repeats(min_run_time, float(_stamps(model, x, starts, 1, conditions)[0].sum()) / 1e3)
    return np.stack([_stamps(model, x, starts, number, conditions)[0].min(axis=0) for _ in range(rounds)])


# -- many networks ----------------------------------------------------------------------------------------------------


class LatencyTimer:
    """Times networks of one space under one set of conditions.

    All networks share one set of random weights (latency does not depend on them), so that many can be kept ready.

    Args:
        space: Builds the networks and lists their layers.
        conditions: The conditions; the device must be this machine's.
        min_run_time: Seconds that one network is repeated for in a round, but at least three times.

    Attributes:
        contention: Share of the wall time of the last measurement that its thread spent off-CPU (other processes).

    Raises:
        LatencyError: The conditions are of another device.
    """

    def __init__(self, space: SearchSpace, conditions: Conditions, min_run_time: float = 0.1) -> None:
        conditions.check_device()
        self.space = space
        self.conditions = conditions
        self.contention = 0.0
        self.min_run_time = min_run_time
        self._nets: dict[str, nn.Module] = {}
        self._pool = torch.empty(0)
        self._seconds: dict[str, float] = {}
        self.network(space.largest)  # the shared weights are as many as it needs

    def network(self, arch: Arch) -> nn.Module:
        """The plain timm network in eval mode, on shared weights."""
        key = arch.canonical().key()
        if key in self._nets:
            return self._nets[key]
        device, dtype = self.conditions.device, PRECISIONS[self.conditions.precision][1]
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            net = self.space.network(arch).to(device, dtype).eval()
        params = list(net.parameters())
        starts = np.cumsum([0, *(-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in params)]).tolist()
        if starts[-1] > self._pool.numel():
            pool = torch.randn(starts[-1], generator=torch.Generator().manual_seed(0)).mul_(0.02)
            self._pool = pool.to(device, dtype)
        for start, param in zip(starts, params, strict=False):
            param.data = self._pool[start : start + param.numel()].view(param.shape)
        self._nets[key] = net
        return net

    def total(self, arch: Arch) -> list[float]:
        """Milliseconds of each repeat of one round, from end to end: [repeats]."""
        return self._repeat(arch, self.network(arch), None)[:, 0].tolist()

    def layers(self, arch: Arch) -> np.ndarray:
        """Milliseconds of each layer of each repeat of one round, [repeats, layers].

        Raises:
            LatencyError: The modules where layers begin are not one for each layer that the Arch lists.
        """
        net = self.network(arch)
        starts, layers = layer_starts(net), self.space.layers(arch)
        if len(starts) != len(layers):
            raise LatencyError(
                f"layers begin at {len(starts)} modules of a {type(net).__name__}, but its {type(arch).__name__} "
                f"lists {len(layers)} layers; define layer_starts() in the network's class, one module for each layer"
            )
        return self._repeat(arch, net, starts)

    def _repeat(self, arch: Arch, net: nn.Module, starts: Sequence[nn.Module] | None) -> np.ndarray:
        x, key = images_of(net, self.conditions), arch.canonical().key()
        if key not in self._seconds:
            self._seconds[key] = float(_stamps(net, x, starts, 1, self.conditions)[0].sum()) / 1e3
        number = repeats(self.min_run_time, self._seconds[key])
        ms, self.contention = _stamps(net, x, starts, number, self.conditions)
        return ms


def run_rounds(
    timer: Any,
    jobs: Mapping[str, tuple[Arch, bool]],
    num_rounds: int,
    done: Iterable[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure networks in interleaved rounds, each round in another order.

    Args:
        timer: A `LatencyTimer` or `OnnxTimer`.
        jobs: By name a network, and whether its layers are timed (else the whole).
        num_rounds: How often each network is measured.
        done: Records of an earlier, broken run; what they hold is not measured again.
        seed: Seed of the order.

    Yields:
        One JSON-plain record per measurement: ``job``, ``round``, ``ms``, the fastest repeat (of each layer), and
        ``contention``, see `LatencyTimer`.
    """
    known = {(record["job"], record["round"]) for record in done}
    for i in range(num_rounds):
        for name in np.random.default_rng([seed, i]).permutation(list(jobs)).tolist():
            if (name, i) in known:
                continue
            arch, split = jobs[name]
            fastest = np.min(timer.layers(arch) if split else timer.total(arch), axis=0)
            ms, contention = np.round(fastest, 6).tolist(), round(timer.contention, 4)
            yield {"job": name, "round": i, "ms": ms, "contention": contention}
