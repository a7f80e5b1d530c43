"""Times of networks and of their layers in ONNX Runtime.

What is measured is what is deployed: the network's graph as `to_onnx` writes it, optimised by ONNX Runtime. A whole
network is timed by the clock around its session's run. Its layers are timed where they stand, in runs of the whole
network, by ONNX Runtime's own profile, which says how long each node took. A node belongs to the layer that the forward
had entered last when the node was traced, so that layers begin where `layer_starts` says, as in PyTorch. A node that
the optimiser made of several keeps none of their names; it belongs to the layer of the node that ran before it, or to
the first layer.

What the profile says of a node includes some microseconds of its own bookkeeping, more than a small node takes. They
are the same for every node, so they are measured (on the space's smallest network, as the difference of profiled and
other runs over its nodes) and taken off. What is left, a latency table's calibration corrects, which is fitted on runs
that are not profiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .onnx import INPUT, ExportError, open_session, package, scopes, to_onnx
from .timing import Conditions, LatencyError, images_of, layer_starts, repeat_call, repeats

if TYPE_CHECKING:
    import onnx

    from ..arch import Arch
    from .space import SearchSpace

__all__ = ["OnnxTimer", "layer_of_nodes", "layer_times"]

_TURNS = 10  # of profiled and other runs, to know what profiling costs
_KERNEL = "_kernel_time"
_POOL = "weights.bin"
_PAGE = 4096  # weights lie at its multiples in the pool, so that they can be mapped


class OnnxTimer:
    """Times networks of one space in ONNX Runtime under one set of conditions.

    Exporting a network takes seconds. The graphs are kept in files, and all of them share one file of random weights
    (latency does not depend on them), so that some tens of networks take no more room than the largest.

    Args:
        space: Builds the networks and lists their layers.
        conditions: The conditions, with the runtime ``"onnxruntime"``; the device must be this machine's.
        min_run_time: Seconds that one network is repeated for in a round, but at least three times.
        folder: Where graphs are kept, and found again; default: in a folder that goes with this object.

    Attributes:
        contention: Share of the wall time of the last measurement that its thread spent off-CPU (other processes).

    Raises:
        LatencyError: The conditions are of another device or runtime.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """

    def __init__(
        self,
        space: SearchSpace,
        conditions: Conditions,
        min_run_time: float = 0.1,
        folder: str | os.PathLike | None = None,
    ) -> None:
        if conditions.runtime != "onnxruntime":
            raise LatencyError(f"the conditions are of the runtime {conditions.runtime}; expected onnxruntime")
        conditions.check_device()
        for name in ("onnx", "onnxscript"):
            package(name)
        self.space = space
        self.conditions = conditions
        self.contention = 0.0
        self.min_run_time = min_run_time
        if folder is None:
            folder = tempfile.mkdtemp(prefix="timm-resnas-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._seconds: dict[str, float] = {}
        self._per_node: float | None = None  # milliseconds that profiling adds to a node
        self._last: tuple[Path, Any] | None = None  # the graph that was timed last, and its session

    def graph(self, arch: Arch) -> Path:
        """File of the network's graph, with the layer of each node beside it (``.json``)."""
        path = self._folder / f"{hashlib.sha256(self._key(arch).encode()).hexdigest()[:16]}.onnx"
        if path.exists():
            return path
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            net = self.space.network(arch).eval()
        x = images_of(net, self.conditions)
        try:
            proto = to_onnx(net, x if len(x) > 1 else x.repeat(2, 1, 1, 1))
        except ExportError as e:
            raise LatencyError(str(e)) from e
        layers = layer_of_nodes(proto, net)
        if (found := max(layers.values()) + 1) != (count := len(self.space.layers(arch))):
            raise LatencyError(
                f"layers begin at {found} modules of a {type(net).__name__}, but its {type(arch).__name__} lists "
                f"{count} layers; define layer_starts() in the network's class, one module for each layer"
            )
        self._share_weights(proto)
        beside = {"layers": layers, "size": list(x.shape[1:])}
        path.with_suffix(".json").write_text(json.dumps(beside), encoding="utf-8")
        fresh = path.with_suffix(".new")
        fresh.write_bytes(proto.SerializeToString())
        fresh.replace(path)
        return path

    def total(self, arch: Arch) -> list[float]:
        """Milliseconds of each repeat of one round, from end to end: [repeats]."""
        return self._whole(arch, self.conditions.batch_size).tolist()

    def layers(self, arch: Arch) -> np.ndarray:
        """Milliseconds of each layer of each repeat of one round, [repeats, layers].

        Raises:
            LatencyError: ONNX Runtime's profile does not show a layer.
        """
        if self._per_node is None:
            self._per_node = self._profiling()
        times, nodes = self._profiled(arch, self.conditions.batch_size)
        return np.maximum(times - self._per_node * nodes, 0)

    def _whole(self, arch: Arch, batch_size: int) -> np.ndarray:
        path = self.graph(arch)
        if self._last is None or self._last[0] != path:
            self._last = path, self._session(path)
        session, feed = self._last[1], self._feed(path, batch_size)
        number = self._repeats(arch, batch_size, session, feed)
        ms, self.contention = repeat_call(lambda: session.run(None, feed), number)
        return ms

    def _profiled(self, arch: Arch, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """What the profile says of each repeat of a round, [repeats, layers], and each layer's number of nodes."""
        path = self.graph(arch)
        layers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["layers"]
        with tempfile.TemporaryDirectory() as scratch:
            session, feed = self._session(path, Path(scratch) / "profile"), self._feed(path, batch_size)
            number = self._repeats(arch, batch_size, session, feed)
            _, self.contention = repeat_call(lambda: session.run(None, feed), number)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times, nodes = layer_times(events, layers)
        return times[-number:], nodes

    def _profiling(self) -> float:
        """Milliseconds that profiling adds to each node; told from one image, of which it is the largest share."""
        arch, count = self.space.smallest, 0
        whole: list[float] = []
        profiled: list[float] = []
        for _ in range(_TURNS):
            whole += self._whole(arch, 1).tolist()
            times, nodes = self._profiled(arch, 1)
            profiled, count = [*profiled, *times.sum(axis=1).tolist()], int(nodes.sum())
        return max(0.0, (min(profiled) - min(whole)) / count)

    def _session(self, path: Path, profile: Path | None = None) -> Any:
        return open_session(path, num_threads=self.conditions.num_threads, profile=profile)

    def _key(self, arch: Arch) -> str:
        return json.dumps([arch.canonical().key(), self.space.model_args], sort_keys=True)

    def _feed(self, path: Path, batch_size: int) -> dict[str, np.ndarray]:
        size = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["size"]
        return {INPUT: torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).numpy()}

    def _repeats(self, arch: Arch, batch_size: int, session: Any, feed: Mapping[str, np.ndarray]) -> int:
        key = f"{self._key(arch)} {batch_size}"
        if key not in self._seconds:
            ms, _ = repeat_call(lambda: session.run(None, feed), 1)
            self._seconds[key] = float(ms[0]) / 1e3
        return repeats(self.min_run_time, self._seconds[key])

    def _share_weights(self, proto: onnx.ModelProto) -> None:
        """Take the weights out of a graph: matrices and filters become parts of the common file of random numbers."""
        import onnx

        end, places = 0, []
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and len(tensor.raw_data) > _PAGE:
                places.append((tensor, end, len(tensor.raw_data)))
                end += -(-len(tensor.raw_data) // _PAGE) * _PAGE
        pool = self._folder / _POOL
        have = pool.stat().st_size if pool.exists() else 0
        if end > have:
            rng = np.random.default_rng(have)
            with pool.open("ab") as f:
                for start in range(have, end, 2**24):
                    count = (min(start + 2**24, end) - start) // 4
                    f.write((0.02 * rng.standard_normal(count, np.float32)).tobytes())
        for tensor, start, size in places:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", _POOL), ("offset", start), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))


def layer_of_nodes(proto: onnx.ModelProto, net: nn.Module) -> dict[str, int]:
    """Number of the layer that each node of a graph belongs to, in the order of `layer_starts`; -1: before the first.

    Args:
        proto: The network's graph, from `to_onnx`.
        net: The network.

    Raises:
        LatencyError: The graph does not show where a layer begins, in the order of the forward.
    """
    names = {module: name for name, module in net.named_modules()}
    starts = [names[module] for module in layer_starts(net)]
    layers, current = {}, -1
    for node in proto.graph.node:  # in the order of the forward
        if current + 1 < len(starts) and starts[current + 1] in scopes(node):
            current += 1
        layers[node.name] = current
    if current + 1 < len(starts):
        raise LatencyError(
            f"the graph of a {type(net).__name__} does not show where its layer {starts[current + 1]} begins, after "
            f"{starts[current] if current >= 0 else 'the start'}; correct layer_starts()"
        )
    return layers


def layer_times(events: Iterable[Mapping[str, Any]], layers: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each layer in each run of a profile of ONNX Runtime, [runs, layers]; nodes of each, [layers].

    Args:
        events: What the profile's file holds.
        layers: From `layer_of_nodes`.

    Raises:
        LatencyError: A layer has no node in a run.
    """
    count = max(layers.values()) + 1
    runs: list[tuple[int, int]] = []
    kernels: list[tuple[int, str, int]] = []
    for event in events:
        if event["name"] == "model_run":
            runs.append((event["ts"], event["ts"] + event["dur"]))
        elif event["name"].endswith(_KERNEL):
            kernels.append((event["ts"], event["name"].removesuffix(_KERNEL), event["dur"]))
    kernels.sort(key=lambda kernel: kernel[0])
    times = np.zeros((len(runs), count))
    for row, part in zip(times, _split(kernels, sorted(runs)), strict=True):
        nodes, current = np.zeros(count, int), -1
        for _, name, microseconds in part:
            # an optimised node is called by one that it stands for and what was done: node_MatMul_98/MatMulScaleFusion
            current = layers.get(name, layers.get(name.partition("/")[0], max(current, 0)))
            if current >= 0:
                row[current] += microseconds / 1e3
                nodes[current] += 1
        if not nodes.all():
            raise LatencyError(
                f"ONNX Runtime's profile names no node of layer {int(nodes.argmin())} of {count}: its optimiser made "
                f"one node of several layers"
            )
    return times, nodes


def _split(kernels: Sequence[tuple[int, str, int]], runs: Sequence[tuple[int, int]]) -> Iterable[Sequence[Any]]:
    starts = [kernel[0] for kernel in kernels]
    for begin, end in runs:
        yield kernels[int(np.searchsorted(starts, begin)) : int(np.searchsorted(starts, end, side="right"))]
