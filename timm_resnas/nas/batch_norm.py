"""Supernets whose sub-networks have batch norm: computed piece by piece, each with statistics of its own.

Statistics of a batch norm belong to one network: those that training gathers over sub-networks of all widths and
depths fit none. Papers: "Universally Slimmable Networks and Improved Training Techniques" -
https://arxiv.org/abs/1903.05134 (statistics computed anew for each sub-network, after training), "Slimmable Neural
Networks" - https://arxiv.org/abs/1812.08928 (a batch norm for each width).
"""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import nn

from ..arch import Arch
from .elastic import zero_grads_for
from .space import SearchSpace
from .supernet import Supernet, checkpoints
from .unchanged import Unchanged
from .units import Importance, Units, magnitude, sort_units

__all__ = ["NARROW", "Piece", "PiecewiseSupernet", "add_narrow_norms", "checkpointed", "recalibrate"]

NARROW = "narrow"  # child of a batch norm: those of fewer channels, by their number
_KEPT = 32  # sub-networks whose statistics are kept
_MOVING = ("running_mean", "running_var", "num_batches_tracked")

torch.fx.wrap("zero_grads_for")  # a leaf of traced networks


def checkpointed(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tensors: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """timm's ``checkpoint``, by which batch statistics move once: not when activations are computed again.

    Args:
        function: What is computed twice.
        x: Its input.
        tensors: Where it finds its buffers by name.
    """

    @contextlib.contextmanager
    def on_copies() -> Iterator[None]:
        before = [dict(found) for found in tensors]
        for found in tensors:
            found.update({k: v.clone() for k, v in found.items() if v is not None and k.endswith(_MOVING)})
        try:
            yield
        finally:
            for found, own in zip(tensors, before, strict=True):
                found.update(own)

    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), on_copies()))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Compute the statistics of a network's batch norms anew: means over the batches, all else as in evaluation.

    Args:
        model: Any network; its mode stays.
        batches: Images [B, C, H, W], batches of one size, of the training's distribution.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None  # None: the mean over all batches
    try:
        for images in batches:
            model(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def add_narrow_norms(norm: nn.Module, widths: Iterable[int]) -> None:
    """Give a batch norm relatives of fewer channels, which sub-networks of these widths use instead of its first ones.

    They are children, ``norm.narrow.<channels>``, which the norm itself does not run.

    Args:
        norm: Of the full network.
        widths: Numbers of channels; its own is left out.
    """
    like: Any = norm
    dd = {"device": like.weight.device, "dtype": like.weight.dtype}
    names = sorted({n for n in widths if n != like.num_features}, reverse=True)
    norm.add_module(NARROW, nn.ModuleDict({str(n): nn.BatchNorm2d(n, like.eps, like.momentum, **dd) for n in names}))


class Piece(NamedTuple):
    """A module of a sub-network's forward.

    Attributes:
        own: Name here of the module whose tensors it takes the first entries of; ``""`` where it has none.
        name: Its name in the extracted network; ``""`` where it has no tensors.
        module: At the sub-network's widths, on meta, of the same structure; it may lack children.
    """

    own: str
    name: str
    module: nn.Module


class PiecewiseSupernet(Supernet):
    """Base of supernets whose sub-networks run in plain modules with slices of the weights, in place of `Supernet`.

    Each group's statistics are those of its own images in training, in which it also moves the running statistics of
    the channels that it uses, or of its widths' own batch norms (`add_narrow_norms`). For evaluation see `recalibrate`.
    With gradient checkpointing they move once, see `checkpointed`; those of the full network as a plain timm model move
    twice, as timm's own do.
    """

    # -- a family supplies -------------------------------------------------------------------------------------------

    @abstractmethod
    def pieces(self, arch: Any) -> Iterator[Piece]:
        """What a sub-network runs, up to what the classifiers read."""

    @abstractmethod
    def classify(self, x: torch.Tensor) -> Any:
        """What the full network's `forward_head` makes of features of a sub-network's width."""

    # -- written once ------------------------------------------------------------------------------------------------

    def set_space(self, space: SearchSpace) -> None:
        """See `Supernet.set_space`."""
        super().set_space(space)
        self._images: list[torch.Tensor] = []
        self._statistics: dict[tuple, dict[str, torch.Tensor]] = {}
        self._statistics_of_weights = Unchanged(())

    def recalibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """See `Supernet.recalibrate`; the images are kept, and those of another size let go by `set_input_size`."""
        self._images = [images.clone() for images in batches]
        self._statistics.clear()
        if self._images:
            active, self.active = self.active, None
            with _float32(self):
                recalibrate(self, self._placed())
            self.active = active

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """See `Supernet.as_saved`; sub-networks have the running statistics of training."""
        images, self._images = self._images, []
        try:
            yield
        finally:
            self._images = images

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, **kwargs: Any) -> None:
        """As the full network's; costs of the space are those at the new size."""
        super().set_input_size(img_size=img_size, patch_size=patch_size, **kwargs)
        size = tuple(self.space.model_args["img_size"])
        if any(tuple(images.shape[2:]) != size for images in self._images):
            self._images = []
        self._statistics.clear()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As the full network's; in training, what only sub-networks use gets gradients of zero."""
        x = super().forward_features(x)  # type: ignore[misc]
        return zero_grads_for(x, self.spare()) if self.training else x

    def spare(self) -> list[nn.Parameter]:
        """Parameters that the full network does not use."""
        return [p for name, p in self.named_parameters() if f".{NARROW}." in name]

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The images, see `Supernet.shared`."""
        own = tuple(self.space.model_args["img_size"])
        if tuple(x.shape[2:]) != own:
            size, want = ("x".join(map(str, s)) for s in (x.shape[2:], own))
            raise ValueError(f"images of {size} do not match the supernet's {want}; see set_input_size")
        return x

    def forward_one(self, h: torch.Tensor, arch: Any) -> Any:
        """See `Supernet.forward_one`."""
        return self._outputs(h, arch, self._tensors(), self._statistics_of(arch), set())

    def forward_groups(self, h: torch.Tensor, archs: Sequence[Any], mode: str) -> Any:
        """See `Supernet.forward_groups`."""
        tensors, used = self._tensors(), set[str]()
        outputs = [
            self._outputs(x, arch, tensors, {} if self.training else self._statistics_of(arch), used)
            for x, arch in zip(h.chunk(len(archs)), archs, strict=True)
        ]
        parts = [o if isinstance(o, tuple) else (o,) for o in outputs]
        if len({part[0].shape[1:] for part in parts}) > 1:
            raise ValueError("sub-networks of several widths need a classifier; the supernet has num_classes=0")
        first, *others = (torch.cat(o) for o in zip(*parts, strict=True))
        heads = {id(p) for head in cast(Any, self).get_classifier() if head is not None for p in head.parameters()}
        unused = [p for name, p in self.named_parameters() if name not in used and id(p) not in heads]
        first = zero_grads_for(first, unused)
        return (first, *others) if others else first

    def extract(self, arch: Any) -> nn.Module:
        """See `Supernet.extract`; with the statistics that the sub-network has here in evaluation."""
        arch = self.check_arch(arch)
        return self._assemble(arch, self._statistics_of(arch)).train(self.training)

    def own_key(self, arch: Any, key: str) -> str:
        """See `Supernet.own_key`."""
        return _own_key(key, self._own_names(arch))

    def sliced_state_dict(self, arch: Arch, net: nn.Module) -> dict[str, torch.Tensor]:
        """See `Supernet.sliced_state_dict`."""
        tensors, names = self._tensors(), self._own_names(arch)
        return {
            key: _source(_own_key(key, names), target.shape, tensors)[1]
            .detach()
            .clone(memory_format=torch.contiguous_format)
            for key, target in net.state_dict().items()
        }

    def sort_channels(self, optimizer: torch.optim.Optimizer | None = None, importance: Importance = magnitude) -> None:
        """See `Supernet.sort_channels`; statistics go along. A channel that is new to a narrower batch norm comes with
        what the full network's has for it."""
        weights, tensors, units = dict(self.named_parameters()), self._tensors(), self.units()
        orders: dict[str, torch.Tensor] = {}

        def of_weights(unit: Units, _: Mapping[str, torch.Tensor]) -> torch.Tensor:
            unit = unit._replace(parts=tuple(p for p in unit.parts if p.param in weights))
            value = importance(unit, weights)
            orders[unit.name] = torch.argsort(value, descending=True, stable=True)
            return value

        sort_units(units, tensors, of_weights, optimizer)
        state = {} if optimizer is None else optimizer.state
        for unit in units:
            for part in unit.parts:
                owner, _, leaf = part.param.rpartition(".")
                for norm in getattr(self.get_submodule(owner), NARROW, nn.ModuleDict()).values():
                    _carry(getattr(norm, leaf), tensors[part.param], orders[unit.name], state)
        for module in self.modules():
            if hasattr(module, "attention_bias_cache"):  # of evaluation, by weights as they were
                module.attention_bias_cache = {}

    def ordinary(self) -> nn.Module:
        """See `Supernet.ordinary`."""
        net = super().ordinary()
        for name in ("_images", "_statistics", "_statistics_of_weights"):
            delattr(net, name)
        return net

    # -- one sub-network ---------------------------------------------------------------------------------------------

    def _own_names(self, arch: Any) -> dict[str, str]:
        """Names here of the extracted network's pieces."""
        return {piece.name: piece.own for piece in self.pieces(arch) if piece.name}

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _placed(self) -> Iterator[torch.Tensor]:
        like = next(self.parameters())
        return (images.to(like.device, like.dtype) for images in self._images)

    def _outputs(
        self,
        x: torch.Tensor,
        arch: Any,
        tensors: Mapping[str, torch.Tensor],
        statistics: Mapping[str, torch.Tensor],
        used: set[str],
    ) -> Any:
        """``used``: names of the tensors that took part are added."""
        again = checkpoints(self)
        for own, name, module in self.pieces(arch):
            given = {}
            for key, shape in _shapes(module):
                source, tensor = _source(f"{own}.{key}", shape, tensors)
                used.add(source)
                given[key] = statistics.get(f"{name}.{key}", tensor)
            run = functools.partial(_run, module, self.get_submodule(own), given)
            x = checkpointed(run, x, [given]) if again else run(x)
        return self.classify(x)

    def _statistics_of(self, arch: Any) -> dict[str, torch.Tensor]:
        """Statistics of a sub-network on the kept images, under its own names; none where there are no images."""
        if not self._images:
            return {}
        weights = list(self.parameters())
        if not self._statistics_of_weights.holds(weights):
            self._statistics.clear()
            self._statistics_of_weights = Unchanged(weights)
        key = (arch.key(), weights[0].dtype, weights[0].device)
        if key not in self._statistics:
            # kept for passes with gradients as well
            with torch.inference_mode(False), torch.no_grad(), _float32(self):
                net = self._assemble(arch, {})
                recalibrate(net, self._placed())
            if len(self._statistics) >= _KEPT:
                self._statistics.pop(next(iter(self._statistics)))
            self._statistics[key] = {
                name: b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))
            }
        return self._statistics[key]

    def _assemble(self, arch: Any, statistics: Mapping[str, torch.Tensor]) -> nn.Module:
        own, args = self.stand_alone(arch)
        net = own.create(**args, device="meta", dtype=next(self.parameters()).dtype)
        state = self.sliced_state_dict(arch, net)
        state.update({name: tensor.clone() for name, tensor in statistics.items()})
        net.load_state_dict(state, assign=True)
        tensors, names = dict(self.named_buffers()), self._own_names(arch)
        for name, _ in net.named_buffers():
            if name not in state:
                before, _, leaf = name.rpartition(".")
                setattr(net.get_submodule(before), leaf, tensors[_own_key(name, names)].clone())
        return net


@torch.no_grad()
def _carry(narrow: torch.Tensor, full: torch.Tensor, order: torch.Tensor, state: Mapping[torch.Tensor, Any]) -> None:
    """Put a narrower norm's entries in the order in which the full one's are already; moments as well."""
    first = order[: len(narrow)]
    own = first < len(narrow)
    pairs = [(narrow, full)]
    others = {k: v for k, v in state.get(full, {}).items() if torch.is_tensor(v) and v.ndim}
    moments = {k: v for k, v in state.get(narrow, {}).items() if torch.is_tensor(v)}
    pairs += [
        (m, others[k]) for k, m in moments.items() if torch.is_tensor(m) and m.shape == narrow.shape and k in others
    ]
    for mine, whole in pairs:
        mine.copy_(torch.where(own, mine[first.clamp(max=len(mine) - 1)], whole[: len(mine)]))


def _own_key(key: str, names: Mapping[str, str]) -> str:
    """A tensor's name in the supernet, by the names of pieces."""
    before, rest = key, ""
    while before:
        if before in names:
            return names[before] + rest
        before, dot, leaf = before.rpartition(".")
        rest = dot + leaf + rest
    return key


def _source(
    name: str, shape: torch.Size | tuple[int, ...], tensors: Mapping[str, torch.Tensor]
) -> tuple[str, torch.Tensor]:
    """(name, tensor): what a sub-network's tensor of this shape is, by the name of the full one."""
    tensor = tensors[name]
    if tensor.shape == shape:
        return name, tensor
    owner, _, leaf = name.rpartition(".")
    narrow = f"{owner}.{NARROW}.{shape[0]}.{leaf}"
    if narrow in tensors:
        return narrow, tensors[narrow]
    # laid out as in a network of its own, for the same rounding
    return name, tensor[tuple(slice(n) for n in shape)].contiguous()


@functools.lru_cache(maxsize=4096)
def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())]


@functools.lru_cache(maxsize=4096)
def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules())


def _run(module: nn.Module, live: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The module with these tensors, in the mode and with the rates of the full network's."""
    for name, part in _named(module):
        other: Any = live.get_submodule(name)
        # what depends on weights and is kept in evaluation would be another sub-network's
        part.training = other.training or hasattr(part, "attention_bias_cache")
        if isinstance(part, DropPath):
            part.drop_prob = getattr(other, "drop_prob", 0.0)
        elif isinstance(part, nn.Dropout):
            part.p = other.p
    return torch.func.functional_call(module, tensors, (x,))


@contextlib.contextmanager
def _float32(net: nn.Module) -> Iterator[None]:
    """Without autocast: statistics are those that the extracted network has."""
    with torch.autocast(next(net.parameters()).device.type, enabled=False):
        yield
