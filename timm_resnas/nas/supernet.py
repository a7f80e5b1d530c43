"""Supernets: one set of weights, every sub-network of a space.

A supernet is the largest network of its space; a sub-network uses the first channels, heads and hidden units of each
layer and skips absent parts. A family mixes `Supernet` into its network's class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..arch import Arch
from .scaling import LAYERS, SwitchableScale
from .space import SearchSpace
from .units import Importance, Units, magnitude, sort_units

__all__ = ["Supernet", "checkpoints", "evaluating", "is_supernet"]

_MAX_CHECKED = 4096  # memory must not grow with the number of candidates


class Supernet(nn.Module, ABC):
    """Base of supernets, in front of the class of the full network: ``class XSupernet(Supernet, X)``.

    As a timm model it is the full network, which torch.jit.script and torch.fx take it for; `set_arch` makes `forward`
    compute a sub-network instead, and ``net(x, archs=[...])`` computes several, each on its part of the batch. The
    backward pass of sub-networks gives every parameter a gradient, zero where none of them uses it.

    Attributes:
        space: The space, at the model arguments of this network.
        active: The sub-network in force; None is the full network.
        modes: Ways in which several sub-networks can be computed; the first is the default.
    """

    space: SearchSpace
    active: Arch | None
    modes: tuple[str, ...] = ("sliced",)

    def set_space(self, space: SearchSpace) -> None:
        """To be called by a family's constructor."""
        self.space = space
        self.active = None
        self._checked: dict[str, Arch] = {}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, **kwargs: Any) -> None:
        """As the full network's; costs of the space are those at the new size."""
        super().set_input_size(img_size=img_size, patch_size=patch_size, **kwargs)  # type: ignore[misc]
        self._restate()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """As the full network's; costs of the space are those with the new classifier."""
        super().reset_classifier(num_classes, global_pool, **kwargs)  # type: ignore[misc]
        self._restate()

    def _restate(self) -> None:
        """The space, at the model arguments of today."""
        net: Any = self
        size = getattr(net, "img_size", None) or net.patch_embed.img_size
        given = {"num_classes": net.num_classes, **({} if size is None else {"img_size": tuple(size)})}
        if "patch_size" in self.space.model_args and hasattr(net.patch_embed, "patch_size"):
            given["patch_size"] = net.patch_embed.patch_size[0]
        self.space = self.space.at(**given)

    # -- a family supplies -------------------------------------------------------------------------------------------

    @abstractmethod
    def check_fit(self, arch: Any) -> None:
        """Say why an architecture of the family is not a sub-network; those of the space always are.

        A family may admit more than its space, such as widths between the space's choices.

        Raises:
            ArchError: The architecture does not fit; the message names the part.
        """

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """What all sub-networks compute alike, such as a stem, once per image. [B, C, H, W] -> [B, ...]

        Raises:
            ValueError: The images have another size than the supernet's.
        """
        return x

    @abstractmethod
    def forward_one(self, h: torch.Tensor, arch: Any) -> Any:
        """Outputs of one sub-network in evaluation, without gradients; ``h`` is from `shared`."""

    @abstractmethod
    def forward_groups(self, h: torch.Tensor, archs: Sequence[Any], mode: str) -> Any:
        """Outputs in batch order; the batch is ``len(archs)`` equal contiguous groups. ``h`` is from `shared`."""

    @abstractmethod
    def units(self) -> tuple[Units, ...]:
        """Heads and hidden units of all layers."""

    def recalibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Batch statistics from these images: of the full network now, of a sub-network when it is next evaluated.

        Sub-networks without batch norm have none, and the batches are left alone.

        Args:
            batches: Images [B, C, H, W] of the training's distribution, batches of one size; some hundred are enough.
        """

    def scales_at(self, arch: Any) -> Sequence[tuple[int, int]]:
        """Which entry of its tables each of ``blocks`` uses, see `SwitchableScale`; of a family that has none, none."""
        return ()

    def own_key(self, arch: Any, key: str) -> str:
        """The name here of a weight of the extracted network."""
        return key

    @abstractmethod
    def stand_alone(self, arch: Any) -> tuple[Arch, dict[str, Any]]:
        """The architecture that an extracted network is created from, and the other arguments of that."""

    def mixture(self, noise: str, temperature: float) -> nn.Module:
        """The network with all paths of each block mixed, where the space `mixes`; it trains like a classifier, and has
        ``probabilities()`` of the paths and the `arch` of the most probable ones.

        Raises:
            ValueError: Blocks have one path, or a setting is out of range.
        """
        raise ValueError(f"blocks of a {type(self).__name__} have one path each; there is nothing to mix")

    # -- written once ------------------------------------------------------------------------------------------------

    def set_arch(self, arch: Any | None) -> None:
        """Make `forward` compute this sub-network; None for the full network.

        Args:
            arch: An `Arch` of the family, or a form that its `Arch.parse` reads.

        Raises:
            ArchError: The architecture does not fit in the supernet; the message names the part.
        """
        self.active = None if arch is None else self.check_arch(arch)

    def check_arch(self, arch: Any) -> Arch:
        """The architecture, if it is a sub-network of this supernet.

        Raises:
            ArchError: It is malformed or does not fit; the message names the part.
        """
        arch = self.space.arch_type.parse(arch)
        known = self._checked.get(arch.key())
        if known is not None and known == arch:  # a key does not say what base it is of
            return known
        self.check_fit(arch)
        if len(self._checked) >= _MAX_CHECKED:
            self._checked.clear()
        self._checked[arch.key()] = arch
        return arch

    @functools.wraps(lambda self, x: None, assigned=())  # the arguments that torch.fx reads: an ordinary network's
    def forward(
        self, x: torch.Tensor, archs: Iterable[Any] | None = None, mode: str | None = None, whole: bool = False
    ) -> Any:
        """Outputs in the forms of the full network's `forward`, in batch order.

        Args:
            x: Images [B, C, H, W].
            archs: Sub-networks, each computed on one of ``len(archs)`` equal contiguous groups of the batch. None: the
                active architecture (`set_arch`) on the whole batch.
            mode: One of `modes`. 'sliced' multiplies only each one's slices of the weights; 'masked', where a family
                has it, computes the full network and masks channels (the paper's way). All give the same outputs and
                gradients up to rounding.
            whole: Compute each sub-network on the whole batch instead of a group of it. Outputs are then those of
                ``len(archs)`` batches, one sub-network after the other; what all compute alike is computed once.

        Raises:
            ValueError: The batch is not a multiple of the number of architectures (unless ``whole``), the images have
                another size than the supernet's, or the mode is unknown.
            ArchError: An architecture does not fit in the supernet.
        """
        if mode is not None and mode not in self.modes:
            raise ValueError(f"mode must be one of {', '.join(self.modes)}; got {mode!r}")
        if archs is None:
            return super().forward(x) if self.active is None else self.forward_shared(self.shared(x))
        archs = [self.check_arch(arch) for arch in archs]
        if not archs or not whole and x.shape[0] % len(archs):
            raise ValueError(f"a batch of {x.shape[0]} images cannot be cut into {len(archs)} equal groups")
        h = self.shared(x)
        if whole:
            h = h.repeat(len(archs), *[1] * (h.ndim - 1))
        return self.forward_groups(h, archs, mode or self.modes[0])

    def forward_shared(self, h: torch.Tensor) -> Any:
        """`forward` of the active architecture from ``net.shared(x)``."""
        arch = self.space.largest if self.active is None else self.active
        if self.training or torch.is_grad_enabled():
            return self.forward_groups(h, [arch], self.modes[0])
        return self.forward_one(h, arch)

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """Sub-networks as the weights alone make them, whatever a family adds to these while it scores."""
        yield

    def ordinary(self) -> nn.Module:
        """The full network in its plain class, with this one's own parameters and buffers."""
        memo: dict[int, Any] = {id(t): t for t in (*self.parameters(), *self.buffers())}
        memo |= {id(self.space): None, id(self._checked): None}
        net = copy.deepcopy(self, memo)
        for name in ("space", "active", "_checked"):
            delattr(net, name)
        kind: Any = next(c for c in type(self).__mro__ if not issubclass(c, Supernet))
        net.__class__ = kind
        return net

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the full network.

        Raises:
            ValueError: A sub-network is in force.
        """
        if self.active is not None:
            raise ValueError("TorchScript compiles a supernet as its full network; compile extract(arch) for another")
        return self.ordinary()

    def extract(self, arch: Any) -> nn.Module:
        """The sub-network as a timm model with a copy of its weights, built through `timm.create_model`.

        Built from the canonical form (absent parts deleted), on the supernet's device and dtype, in its mode.

        Raises:
            ArchError: The architecture does not fit in the supernet.
        """
        arch = self.check_arch(arch)
        dtype = next(self.parameters()).dtype
        # on the meta device there is nothing to initialise
        own, args = self.stand_alone(arch)
        net = own.create(**args, device="meta", dtype=dtype)
        net.load_state_dict(self.sliced_state_dict(arch, net), assign=True)
        return net.train(self.training)

    def sliced_state_dict(self, arch: Arch, net: nn.Module) -> dict[str, torch.Tensor]:
        """The sub-network's part of the weights, copied, under the keys of the extracted ``net``."""
        runs = {part.param: part for unit in self.units() for part in unit.parts if part.runs > 1}
        source, factors = self.state_dict(), self._factors(arch)
        out = {}
        for key, target in net.state_dict().items():
            name = self.own_key(arch, key)
            value = source[name]
            if name in factors:
                value = value * factors[name].view(-1, *[1] * (value.ndim - 1))
            if part := runs.get(name):
                # each run has the first units in front
                kept = target.shape[part.dim] // part.runs
                value = value.unflatten(part.dim, (part.runs, -1)).narrow(part.dim + 1, 0, kept)
                value = value.flatten(part.dim, part.dim + 1)
            value = value[tuple(slice(n) for n in target.shape)]
            out[key] = value.detach().clone(memory_format=torch.contiguous_format)
        return out

    def _factors(self, arch: Arch) -> dict[str, torch.Tensor]:
        """What each output of the layers named is multiplied by in a sub-network; an extracted one has it inside."""
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, SwitchableScale):
                block, _, which = name.rpartition(".")
                row = module.table[self.scales_at(arch)[int(block.rpartition(".")[2])]]
                found.update({f"{block}.{LAYERS[which]}.{kind}": row for kind in ("weight", "bias")})
        return found

    def no_weight_decay(self) -> set[str]:
        """As the full network's, and scales."""
        own = {f"{n}.table" for n, module in self.named_modules() if isinstance(module, SwitchableScale)}
        return own | set(super().no_weight_decay())  # type: ignore[misc]

    def sort_channels(self, optimizer: torch.optim.Optimizer | None = None, importance: Importance = magnitude) -> None:
        """Put hidden units and heads in order of importance, so that sub-networks keep the best.

        The function of the full network stays; that of sub-networks changes. Stable and in place; gradients are
        permuted along. In distributed training every process must call it.

        Args:
            optimizer: Its moments are permuted along (the paper's released code leaves them where they were).
            importance: Of each unit of a layer.

        Raises:
            ValueError: The optimizer keeps a state that is not per weight, such as factored moments.
        """
        sort_units(self.units(), dict(self.named_parameters()), importance, optimizer)


def checkpoints(model: nn.Module) -> bool:
    """Whether the backward pass of what is computed now will compute activations again."""
    return torch.is_grad_enabled() and any(getattr(m, "grad_checkpointing", False) for m in model.modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation; afterwards every module is in the mode that it was in, which may be its own."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def is_supernet(model: nn.Module) -> bool:
    """Whether a model holds sub-networks."""
    return isinstance(model, Supernet)
