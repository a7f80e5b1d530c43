"""Any timm vision transformer as a supernet: its heads and hidden units, block by block, fewer or none.

`elastic` makes one of a model; what is found is a `vit_elastic`. The embedding width stays. Units are put in order of
importance on images, and a narrower network is repaired in closed form, so that a pretrained model can be shrunk
without training.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from timm.models.cait import ClassAttn
from torch import nn

from ..arch import ArchError, Units
from ..models.narrow import Branch, NarrowError, Size, branches, first_units, owner_of, prunable_class
from ..models.vit_elastic import DEFAULT_BASE, base_cfg, checkpoint_filter_fn, create_base, default_cfg
from ..nas.elastic import zero_grads_for
from ..nas.repair import Moments, Reader, correction
from ..nas.space import SearchSpace
from ..nas.supernet import Supernet, checkpoints, evaluating
from ..nas.unchanged import Unchanged
from .elastic_space import ElasticArch, ElasticSpace, check_pairs, check_widths

__all__ = [
    "REPAIR_ROWS",
    "ElasticSupernet",
    "build_supernet",
    "elastic",
    "repair_narrower",
    "space_of",
    "supernet_over",
]

REPAIR_ROWS = 64  # images at a time in a branch that is repaired


# -- layers of the supernet --------------------------------------------------------------------------------------------


class ElasticLayer(nn.Module):
    """In front of a timm attention or MLP class: computes with the first units, as many as are in force.

    Attributes:
        branch: Its units.
        in_force: Number of units for each of as many equal groups of the batch; None: all.
        reader: Repaired weights for any number of units, used while no gradients are asked for.
        read: The layer's weights that the reader was made for.
        repairing: While a network is repaired: collects corrections.
    """

    branch: Branch
    in_force: tuple[int, ...] | None
    reader: Reader | None
    read: Unchanged
    repairing: dict[str, torch.Tensor] | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As that of timm's class. [B, N, dim] -> [B, N, dim]"""
        if self.in_force is None:
            return super().forward(x, *args, **kwargs)
        if self.repairing is not None:
            return self._repaired(x, self.in_force[0], *args, **kwargs)
        each, start, outs = x.shape[0] // len(self.in_force), 0, []
        for keep, run in itertools.groupby(self.in_force):
            stop = start + each * len(list(run))
            outs.append(self._at(keep, x[start:stop], *args, **kwargs))
            start = stop
        y = outs[0] if len(outs) == 1 else torch.cat(outs)
        # where all are absent, the norm in front is as unused as the layer
        return zero_grads_for(y, [x, *self.parameters()] if not any(self.in_force) else [])

    def _at(self, keep: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if keep == 0:
            return torch.zeros_like(x[:, :1] if isinstance(self, ClassAttn) else x)
        with self.narrowed(keep):
            return super().forward(x, *args, **kwargs)

    @contextlib.contextmanager
    def narrowed(self, keep: int, reader: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Attributes of the instance hide parameters and widths with those of the first units.

        Args:
            keep: Number of units.
            reader: Weights of `last` by name in the network; None: those of `reader`, while no gradients are asked for.
        """
        if keep == self.branch.units.count:
            yield
            return
        own = len(self.branch.units.name) + 1
        hidden: list[tuple[nn.Module, str]] = []
        before: list[tuple[nn.Module, Size]] = []
        if reader is None and self.reader is not None and not torch.is_grad_enabled():
            reader = self.read_by(keep)  # of today's weights, or none
        try:
            for part in (*self.branch.units.parts, *self.branch.buffers):
                owner, name = owner_of(self, part.param[own:])
                owner.__dict__[name] = first_units(getattr(owner, name), part, keep)
                hidden.append((owner, name))
            for name, value in (reader or {}).items():
                owner, name = owner_of(self, name[own:])
                owner.__dict__[name] = value
                hidden.append((owner, name))
            for size in self.branch.sizes:
                owner = self.get_submodule(size.module[own:])
                before.append((owner, size))
                value = keep * size.each
                owner.__dict__[size.attribute] = (value,) if size.attribute == "normalized_shape" else value
            yield
        finally:
            for owner, name in hidden:
                owner.__dict__.pop(name, None)
            for owner, size in before:
                value = self.branch.units.count * size.each
                owner.__dict__[size.attribute] = (value,) if size.attribute == "normalized_shape" else value

    # -- repair ------------------------------------------------------------------------------------------------------

    @property
    def last(self) -> nn.Linear:
        """What reads the units."""
        return owner_of(self, self.branch.units.parts[-1].param[len(self.branch.units.name) + 1 :])[0]

    def read_by(self, keep: int) -> dict[str, torch.Tensor]:
        """Repaired weight and bias of `last` for the first units, by name in the network; kept once computed.

        Once the weights change, what was found for others is dropped.
        """
        if self.reader is not None and not self.read.holds(self.parameters()):
            self.reader = None
        if self.reader is None:
            return {}
        kept, like = self.reader.kept, self.last.weight
        key = (keep, like.dtype, like.device)  # a network may be moved
        if key not in kept:
            values = self.reader.at(keep * self.branch.width)
            kept[key] = self._named(*values)
        return kept[key]

    def __getstate__(self) -> dict[str, Any]:
        stale = self.reader is not None and not self.read.holds(self.parameters())
        return {**self.__dict__, "reader": None if stale else self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.read = Unchanged(self.parameters())  # a copy's repair is that of its own weights

    def _named(self, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        name, like = self.branch.units.parts[-1].param.removesuffix("weight"), self.last.weight
        named = {f"{name}weight": weight} if bias is None else {f"{name}weight": weight, f"{name}bias": bias}
        return {k: v.to(like).contiguous() for k, v in named.items()}

    def _repaired(self, x: torch.Tensor, keep: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Outputs of the repaired layer on all calibration images; the repair goes into `repairing`."""
        if keep in (0, self.branch.units.count):
            return self._at(keep, x, *args, **kwargs)
        with self.narrowed(keep, self.repair(x, keep, *args, **kwargs)):
            return torch.cat([super(ElasticLayer, self).forward(p, *args, **kwargs) for p in x.split(REPAIR_ROWS)])

    def repair(self, x: torch.Tensor, keep: int, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Weights of `last` that are repaired on all calibration images, by name; they go into `repairing`, too."""
        if keep in (0, self.branch.units.count):
            return {}
        moments, last = Moments(), self.last
        seen: list[torch.Tensor] = []
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        weight = first_units(last.weight, self.branch.units.parts[-1], keep)
        as_it_is = self._named(weight, last.bias)
        try:
            for part in x.split(REPAIR_ROWS):
                whole = super().forward(part, *args, **kwargs)
                seen.clear()
                with self.narrowed(keep, as_it_is):
                    missing = whole - super().forward(part, *args, **kwargs)
                moments.add(seen.pop(), missing)
        finally:
            handle.remove()
        more, shift = correction(moments, last.bias is not None)
        fixed = self._named(weight.double() + more, None if shift is None else last.bias.double() + shift)
        self.repairing.update(fixed)
        return fixed


@cache
def _front(mixin: type, kind: type) -> type:
    return type(f"Elastic{kind.__name__}", (mixin, kind), {"__module__": __name__, "__doc__": kind.__doc__})


class ElasticSupernet(Supernet):
    """A timm vision transformer and all its narrower forms; see `elastic`.

    The forward is timm's; the attention and MLP layers in it read how many of their units are in force.
    """

    def set_layers(self) -> None:
        """Make attention and MLP layers elastic."""
        for branch in (b for pair in branches(self) for b in pair):
            layer = self.get_submodule(branch.units.name)
            layer.__class__ = _front(ElasticLayer, prunable_class(layer))
            layer.branch, layer.in_force, layer.reader, layer.repairing = branch, None, None, None
            layer.read = Unchanged(layer.parameters())

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """See `Supernet.as_saved`: without the repair of `calibrate`."""
        layers = self.elastic_layers()
        readers = [layer.reader for layer in layers]
        try:
            for layer in layers:
                layer.reader = None
            yield
        finally:
            for layer, reader in zip(layers, readers, strict=True):
                layer.reader = reader

    def ordinary(self) -> nn.Module:
        """See `Supernet.ordinary`."""
        net = super().ordinary()
        for layer in [m for m in net.modules() if isinstance(m, ElasticLayer)]:
            for name in ("branch", "in_force", "reader", "read", "repairing"):
                delattr(layer, name)
            layer.__class__ = type(layer).__bases__[1]
        return net

    def elastic_layers(self) -> list[ElasticLayer]:
        """All of them, in the order of `units`."""
        return [m for m in self.modules() if isinstance(m, ElasticLayer)]

    def units(self) -> tuple[Units, ...]:
        """See `Supernet.units`."""
        return tuple(layer.branch.units for layer in self.elastic_layers())

    def check_fit(self, arch: ElasticArch) -> None:
        """See `Supernet.check_fit`; any widths up to the largest network's fit."""
        if arch.base != self.space.base:
            raise ArchError(f"the network is a {arch.base}, the supernet a {self.space.base}")
        check_pairs(arch)
        check_widths(arch, self.space.largest.widths)
        for i, (pair, (attn, _)) in enumerate(zip(arch.widths, self.space.structure.pairs, strict=True)):
            if attn.whole and pair[0] not in (0, attn.count):
                raise ArchError(f"block {i}: its heads are mixed, so that all {attn.count} or none can be there")

    def forward_one(self, h: torch.Tensor, arch: ElasticArch) -> Any:
        """See `Supernet.forward_one`."""
        return self.forward_groups(h, [arch], "sliced")

    def forward_groups(self, h: torch.Tensor, archs: Sequence[ElasticArch], mode: str) -> Any:
        """See `Supernet.forward_groups`.

        Raises:
            ValueError: Gradients are asked for, with gradient checkpointing.
        """
        if checkpoints(self):
            raise ValueError(
                "with gradient checkpointing the backward pass would compute the full network in place of narrower "
                "ones; turn it off by set_grad_checkpointing(False)"
            )
        layers = self.elastic_layers()
        counts = [[n for pair in arch.widths for n in pair] for arch in archs]
        try:
            for layer, *keep in zip(layers, *counts, strict=True):
                layer.in_force = tuple(keep)
            return super(Supernet, self).forward(h)
        finally:
            for layer in layers:
                layer.in_force = None

    def stand_alone(self, arch: ElasticArch) -> tuple[ElasticArch, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        cfg = {**self.pretrained_cfg, "architecture": arch.model}
        return arch, {**self.space.model_args, "pretrained_cfg": cfg}

    def extract(self, arch: Any, repair: torch.Tensor | None = None) -> nn.Module:
        """See `Supernet.extract`.

        Args:
            arch: The sub-network.
            repair: Images, [n, C, H, W]: each narrowed layer is repaired on what the repaired ones before it make of
                them; unlabelled, 256 to 1024 are enough. None: repaired as while scoring, where `calibrate` was called.
        """
        arch = self.check_arch(arch)
        own, args = self.stand_alone(arch)
        param = next(self.parameters())
        # not on the meta device: tables that timm computes in constructors are no part of the weights
        net = own.create(**args).to(param.device, param.dtype)
        weights = self.sliced_state_dict(arch, net)
        weights.update(self.repaired(arch, repair))
        net.load_state_dict(weights)
        return net.train(self.training)

    # -- order of importance, repair ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor], repair: bool = True) -> None:
        """Put heads and hidden units in order of what they add to their layer's output on images.

        Hidden units by E[u^2] |w_out|^2, heads by E|z_h W_o|^2. The function of the full network stays.

        Args:
            batches: Images, [B, C, H, W] each; labels are not needed.
            repair: Also repair narrowed networks from now on, while they are scored: the layers that read units are
                regressed on the kept ones, each on the full network's activations.

        Raises:
            ValueError: There is no batch, or activations are not finite.
        """
        layers = [layer for layer in self.elastic_layers() if layer.branch.units.count]
        moments = [Moments() for _ in layers]
        handles = [
            layer.last.register_forward_pre_hook(lambda _, inputs, m=m: m.add(inputs[0]))
            for layer, m in zip(layers, moments, strict=True)
        ]
        active, self.active = self.active, None
        try:
            with evaluating(self):
                for images in batches:
                    self(images)
        finally:
            for handle in handles:
                handle.remove()
            self.active = active
        if not all(m.rows for m in moments):
            raise ValueError("calibrate needs images: there was no batch")
        strength = {}
        for layer, m in zip(layers, moments, strict=True):
            units, width = layer.branch.units, layer.branch.width
            weight = layer.last.weight.double().unflatten(1, (units.count, width))  # [out, units, width]
            blocks = m.second.unflatten(0, (units.count, width)).unflatten(2, (units.count, width))
            own = torch.diagonal(blocks, dim1=0, dim2=2)  # [width, width, units]
            strength[units.name] = torch.einsum("ouw,wvu,ouv->u", weight, own, weight)
            if layer.branch.whole:
                strength[units.name] = strength[units.name].new_zeros(units.count)
        self.sort_channels(importance=lambda units, _: strength.get(units.name, torch.zeros(0)))
        for layer, m in zip(layers, moments, strict=True):
            layer.reader = None
            if repair and not layer.branch.normed and not layer.branch.whole:
                order = torch.argsort(strength[layer.branch.units.name], descending=True, stable=True)
                within = torch.arange(layer.branch.width, device=order.device)
                m.reorder((order[:, None] * layer.branch.width + within).flatten())
                layer.reader = Reader(m, layer.last.weight, layer.last.bias)
                layer.read = Unchanged(layer.parameters())

    @torch.no_grad()
    def repaired(self, arch: ElasticArch, images: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Repaired weights of a sub-network by name, see `extract`."""
        layers, found = self.elastic_layers(), {}
        if images is None:
            for layer, keep in zip(layers, (n for pair in arch.widths for n in pair), strict=True):
                if layer.reader is not None and 0 < keep < layer.branch.units.count:
                    found.update(layer.read_by(keep))
            return found
        try:
            for layer in layers:
                layer.repairing = found
            with evaluating(self):
                self.forward_groups(images, [arch], "sliced")
        finally:
            for layer in layers:
                layer.repairing = None
        return found


def _as_supernet(model: nn.Module, space: ElasticSpace, kind: type[ElasticSupernet]) -> ElasticSupernet:
    model.__class__ = _front(kind, type(model))
    model.set_space(space)
    model.set_layers()
    return model


def supernet_over(space: ElasticSpace, model: nn.Module) -> ElasticSupernet:
    """The supernet of a space with the weights, the configuration, the device and the mode of a model."""
    cfg = {**model.pretrained_cfg, "architecture": space.supernet}
    net = timm.create_model(space.supernet, space=space.to_dict(), pretrained_cfg=cfg)
    net.load_state_dict(model.state_dict())
    param = next(model.parameters())
    return net.to(param.device, param.dtype).train(model.training)


def space_of(model: nn.Module, **model_args: Any) -> ElasticSpace:
    """The narrower forms of a timm vision transformer; see `elastic`."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        raise NarrowError(
            f"a {type(model).__name__} was not made by timm.create_model, which is needed to build it again"
        )
    args = {**get_model_args(model), **model_args}
    base, widths = cfg["architecture"], None
    if base == ElasticArch.model:  # one that was shrunk before
        base, widths = args.pop("base", DEFAULT_BASE), args.pop("widths", None)
    json_plain = json.loads(json.dumps(args))
    if "img_size" not in json_plain:
        json_plain["img_size"] = list(cfg["input_size"][1:])
    space = ElasticSpace(base, **json_plain)
    if widths is None:
        return space
    arch = ElasticArch.from_args({"base": base, "widths": widths})
    check_pairs(arch)
    return ElasticSpace(base, _within(space, arch), **json_plain)


def elastic(model: nn.Module, **model_args: Any) -> ElasticSupernet:
    """A supernet over a copy of a timm vision transformer, with its weights.

    >>> net = timm_resnas.elastic(timm.create_model("vit_small_patch16_224", pretrained=True))
    >>> net.calibrate(images.split(64))  # unlabelled images: order of importance, repair
    >>> arch = net.space.sample(np.random.default_rng(0), Budget.parse("macs=60%", net.space.costs(net.space.largest)))
    >>> small = net.extract(arch, repair=images)  # a vit_elastic

    Args:
        model: Made by `timm.create_model`, of a kind that `timm_resnas.models.narrow.branches` knows.
        **model_args: Arguments of the model that it does not tell itself.

    Raises:
        NarrowError: The model cannot be narrowed; the message names the module.
    """
    return supernet_over(space_of(model, **model_args), model)


@torch.no_grad()
def repair_narrower(small: nn.Module, whole: nn.Module, images: torch.Tensor) -> None:
    """Repair, in place, a network that has the first heads and hidden units of another one, see `extract`.

    Args:
        small: The narrower network, of the same embedding widths and blocks.
        whole: What its layers are to add up to.
        images: [n, C, H, W]; unlabelled, 256 to 1024 are enough.

    Raises:
        NarrowError: See `elastic`.
    """
    net = elastic(whole).eval()
    widths = [[attn.units.count, mlp.units.count] for attn, mlp in branches(small)]
    arch = net.check_arch({"base": net.space.base, "widths": widths})
    small.load_state_dict({**small.state_dict(), **net.repaired(arch, images)})


def _within(space: ElasticSpace, arch: ElasticArch) -> list[list[list[int]]]:
    """The space's choices up to a network's widths."""
    return [
        [[most, *(n for n in options if n < most)] for most, options in zip(pair, choices, strict=True)]
        for pair, choices in zip(arch.widths, space.choices, strict=True)
    ]


default_cfgs = generate_default_cfgs({"vit_elastic_supernet": default_cfg("vit_elastic_supernet")})


@register_model
def vit_elastic_supernet(pretrained: bool = False, space: Mapping[str, Any] | None = None, **kwargs) -> ElasticSupernet:
    """Supernet of the narrower forms of a timm vision transformer; ``space`` is the dict of `ElasticSpace.to_dict`."""
    return build_supernet(ElasticSpace, ElasticSupernet, lambda net, _: net, pretrained, space, **kwargs)


def build_supernet(
    space_type: type[ElasticSpace],
    kind: type[ElasticSupernet],
    prepare: Callable[[nn.Module, Any], nn.Module],
    pretrained: bool,
    space: Mapping[str, Any] | None,
    **kwargs: Any,
) -> Any:
    """What entry points of elastic supernets do.

    Args:
        space_type: Of the spaces that it takes.
        kind: Of the supernet.
        prepare: From the base and the space to the network that becomes the supernet.
        pretrained: See timm.
        space: The dict of `SearchSpace.to_dict`; None: the default one.
        **kwargs: Of the base and of timm.
    """
    name = space_type.supernet
    if isinstance(space, SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass space.to_dict()")
    opened = space_type() if space is None else SearchSpace.from_dict(space)
    if type(opened) is not space_type:
        raise ValueError(f"the space of {name} is of the family {space_type.family!r}, got one of {opened.family!r}")
    args = {k: kwargs.pop(k, v) for k, v in opened.model_args.items()}
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg(opened.base, name)

    def build(**given: Any) -> ElasticSupernet:
        whole = opened.largest.widths == opened.structure.widths
        model = prepare(create_base(opened.base, None if whole else opened.largest.widths, **given), opened)
        return _as_supernet(model, opened.at(**{k: v for k, v in given.items() if k in args}), kind)

    return build_model_with_cfg(
        build,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **args,
        **kwargs,
    )
