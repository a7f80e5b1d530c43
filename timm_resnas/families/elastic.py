"""Any timm vision transformer as a supernet: its heads and hidden units, block by block, fewer or none.

`elastic` makes one of a model; what is found is a `vit_elastic`. The embedding width stays. Units are put in order of
importance on images, and a narrower network is repaired in closed form, so that a pretrained model can be shrunk
without training.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from timm.models.cait import ClassAttn
from torch import nn

from ..arch import Arch, ArchError, Layer, Units
from ..models.narrow import Branch, NarrowError, Size, branches, first_units, owner_of, prunable_class
from ..models.vit_elastic import DEFAULT_BASE, base_cfg, check_base, checkpoint_filter_fn, create_base, default_cfg
from ..nas.count import count_modules
from ..nas.elastic import zero_grads_for
from ..nas.repair import Moments, Reader, correction
from ..nas.space import Gene, Position, SearchSpace
from ..nas.supernet import Supernet

__all__ = ["ElasticArch", "ElasticSpace", "ElasticSupernet", "elastic"]

HIDDEN_STEPS = 16  # choices of hidden units in a block
HIDDEN_MULTIPLE = 8  # kernels are slow at odd widths
REPAIR_ROWS = 64  # images at a time in a branch that is repaired

Widths = tuple[tuple[int, int], ...]


# -- what a base consists of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """Attention or MLP of a block of a base, and its cost for any number of units."""

    kind: str
    tokens: int
    dim: int
    count: int
    width: int
    whole: bool
    runs: int  # values that each unit computes: 3 for query, key and value
    macs: tuple[int, int]  # beside the units, and of each
    params: tuple[int, int]

    def layer(self, keep: int) -> Layer | None:
        if keep == 0:
            return None
        inner = keep * self.width
        params = self.params[0] + keep * self.params[1]
        if self.kind == "attention":
            shape = dict(num_heads=keep, head_dim=self.width)
            memory = self.tokens * (3 * self.dim + (self.runs + 1) * inner)
        else:
            shape = dict(hidden=keep)
            memory = self.tokens * max(3 * self.dim + 2 * self.runs * inner, 4 * self.dim + inner)
        macs = self.macs[0] + keep * self.macs[1]
        return Layer.of(
            self.kind,
            tokens=self.tokens,
            dim=self.dim,
            # these tell layers of one shape with and without biases, norms and gates apart
            params_beside=self.params[0],
            params_each=self.params[1],
            macs=macs,
            params=params,
            memory=memory,
            **shape,
        )


@dataclass(frozen=True)
class _Structure:
    """A base at some model arguments: its branches, and the layers that stay."""

    stem: Layer
    pairs: tuple[tuple[_Branch, _Branch], ...]
    between: tuple[tuple[int, Layer], ...]  # layers without branches, and how many blocks stand before each
    head: Layer

    @property
    def widths(self) -> Widths:
        return tuple((attn.count, mlp.count) for attn, mlp in self.pairs)

    def order(self) -> Iterator[Layer | tuple[int, int]]:
        """Its parts in the order of the forward; branches as (block, 0 or 1)."""
        yield self.stem
        for i in range(len(self.pairs) + 1):
            yield from (layer for before, layer in self.between if before == i)
            if i < len(self.pairs):
                yield from ((i, 0), (i, 1))
        yield self.head


_OF_TRAINING = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def _structure(base: str, model_args: Mapping[str, Any]) -> _Structure:
    """Counted on the meta device: no weights are made.

    Raises:
        NarrowError: See `vit_elastic`; or the base refuses the arguments.
    """
    kept = {k: v for k, v in model_args.items() if k not in _OF_TRAINING}
    return _counted(base, json.dumps(kept, sort_keys=True))


@lru_cache(maxsize=64)
def _counted(base: str, model_args: str) -> _Structure:
    args = json.loads(model_args)
    try:
        with torch.device("meta"):
            full = create_base(base, None, **args)
            pairs = branches(full)
            least = tuple((a.units.count if a.whole else 1, 1) for a, _ in pairs)
            thin = create_base(base, least, **args)
    except NarrowError:
        raise
    except TypeError as e:
        with torch.device("meta"):
            create_base(base, None)  # a network of another kind is refused for that, not for its arguments
        raise NarrowError(f"{base} cannot be built with {model_args:.200}: {e}") from None
    except (ValueError, AssertionError, RuntimeError) as e:
        raise NarrowError(f"{base} cannot be built with {model_args:.200}: {e}") from None
    size = (args["in_chans"], *args["img_size"])
    counts, thin_counts = count_modules(full, size), count_modules(thin, size)
    tokens = _token_shapes(full, [b for pair in pairs for b in pair], size)
    params = {name: p.numel() for name, p in full.named_parameters()}

    def branch(b: Branch) -> _Branch:
        count, name = b.units.count, b.units.name
        each = 0
        if count > 1 and not b.whole:
            each, rest = divmod(counts[name] - thin_counts[name], count - 1)
            assert rest == 0, name
        own = sum(n for p, n in params.items() if b.owns(p))
        unit = sum(params[part.param] for part in b.units.parts) // count
        if b.whole:
            unit = 0
        runs = 3 if b.kind == "attention" else max(1, sum(_makes(full, b)) // (count * b.width))
        return _Branch(
            b.kind, *tokens[name], count, b.width, b.whole, runs,
            (counts[name] - count * each, each), (own - count * unit, unit),
        )  # fmt: skip

    found = tuple((branch(a), branch(m)) for a, m in pairs)
    inside = {b.block for pair in pairs for b in pair}
    between = tuple(_between(full, inside, counts, params))
    head = [n for n in ("norm", "fc_norm", "head", "head_dist", "attn_pool", "patch_head") if hasattr(full, n)]
    head_params = sum(n for p, n in params.items() if p.partition(".")[0] in head)
    head_macs = sum(counts.get(n, 0) for n in head)
    rest = sum(layer.params for _, layer in between) + sum(
        b.params[0] + b.count * b.params[1] for p in found for b in p
    )
    rest_macs = sum(layer.macs for _, layer in between) + sum(b.macs[0] + b.count * b.macs[1] for p in found for b in p)
    n, dim = tokens[pairs[0][0].units.name]
    stem = Layer.of(
        "stem", tokens=n, dim=dim, in_chans=size[0], height=size[1], width=size[2],
        macs=counts[""] - head_macs - rest_macs, params=sum(params.values()) - head_params - rest, memory=2 * n * dim,
    )  # fmt: skip
    ending = Layer.of("head", dim=dim, num_classes=full.num_classes, macs=head_macs, params=head_params)
    return _Structure(stem, found, between, ending)


def _makes(model: nn.Module, branch: Branch) -> list[int]:
    """Rows of the weights that make the units."""
    return [model.get_submodule(size.module).out_features for size in branch.sizes if size.attribute == "out_features"]


def _token_shapes(model: nn.Module, found: Sequence[Branch], size: Sequence[int]) -> dict[str, tuple[int, int]]:
    """(tokens, channels) that each branch gets."""
    shapes: dict[str, tuple[int, int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple) -> None:
            x = inputs[0]  # [B, N, dim]
            shapes[name] = math.prod(x.shape[1:-1]), x.shape[-1]

        return note

    handles = [model.get_submodule(b.units.name).register_forward_pre_hook(hook(b.units.name)) for b in found]
    with torch.no_grad():
        model.eval()(torch.empty(1, *size, device="meta"))
    for handle in handles:
        handle.remove()
    return shapes


def _between(
    model: nn.Module, inside: set[str], counts: Mapping[str, int], params: Mapping[str, int]
) -> Iterator[tuple[int, Layer]]:
    """Members of ``model.blocks`` without branches, such as spatial reductions."""
    seen = 0
    for name, _ in getattr(model, "blocks", nn.Module()).named_children():
        block = f"blocks.{name}"
        if block in inside:
            seen += 1
        elif not any(b.startswith(f"{block}.") for b in inside):
            own = sum(n for p, n in params.items() if p.startswith(f"{block}."))
            yield seen, Layer.of("block", number=int(name), macs=counts.get(block, 0), params=own)


# -- networks and spaces -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElasticArch(Arch):
    """A timm vision transformer with its own heads and hidden units in each block.

    Attributes:
        base: The timm model.
        widths: (num_heads, mlp_hidden) of each block; 0: that branch is absent.
    """

    model: ClassVar[str] = "vit_elastic"
    base: str
    widths: Widths

    def args(self) -> dict[str, Any]:
        """See `Arch.args`."""
        return {"base": self.base, "widths": [list(pair) for pair in self.widths]}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ElasticArch:
        """See `Arch.from_args`."""
        try:
            base = check_base(args.get("base", DEFAULT_BASE))
        except NarrowError as e:
            raise ArchError(str(e)) from None
        widths = args.get("widths")
        if widths is None:
            raise ArchError("widths of vit_elastic are missing; expected [num_heads, mlp_hidden] of each block")
        if not isinstance(widths, list | tuple) or not widths or len(widths) > 1000:
            raise ArchError(f"widths must be a list of [num_heads, mlp_hidden], one for each block, got {widths!r:.60}")
        for i, pair in enumerate(widths):
            good = isinstance(pair, list | tuple) and len(pair) == 2
            if not good or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 1 << 20 for n in pair):
                raise ArchError(f"widths[{i}] must be [num_heads, mlp_hidden], got {pair!r:.60}")
        return cls(base, tuple((pair[0], pair[1]) for pair in widths))

    def key(self) -> str:
        """See `Arch.key`."""
        return "|".join(f"{heads},{hidden}" for heads, hidden in self.widths)

    def layers(
        self, img_size: Any = 224, in_chans: int = 3, num_classes: int = 1000, **model_args
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`; ``model_args`` are the base's own."""
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        known = {"img_size": size, "in_chans": in_chans, "num_classes": num_classes, **model_args}
        try:
            structure = _structure(self.base, known)
        except NarrowError as e:
            raise ArchError(str(e)) from None
        _check_widths(self, structure.widths)
        found = []
        for part in structure.order():
            layer = (
                part
                if isinstance(part, Layer)
                else structure.pairs[part[0]][part[1]].layer(self.widths[part[0]][part[1]])
            )
            found += [] if layer is None else [layer]
        return tuple(found)


def _check_widths(arch: ElasticArch, limit: Widths) -> None:
    if len(arch.widths) != len(limit):
        raise ArchError(f"{arch.base} has {len(limit)} blocks, the widths are of {len(arch.widths)}")
    for i, (pair, most) in enumerate(zip(arch.widths, limit, strict=True)):
        if pair[0] > most[0] or pair[1] > most[1]:
            raise ArchError(f"block {i} has at most {most[0]} heads and {most[1]} hidden units, the widths want {pair}")


def hidden_choices(hidden: int, steps: int = HIDDEN_STEPS) -> tuple[int, ...]:
    """Numbers of hidden units in equal steps from all to none, in multiples of 8."""
    multiple = HIDDEN_MULTIPLE if hidden >= steps * HIDDEN_MULTIPLE else 1
    inner = {max(multiple, round(hidden * k / steps / multiple) * multiple) for k in range(1, steps)}
    return (hidden, *sorted((n for n in inner if n < hidden), reverse=True), 0)


class ElasticSpace(SearchSpace):
    """Networks of one base that differ in heads and hidden units of each block.

    Args:
        base: The timm model.
        choices: Of each block, numbers of heads and of hidden units, largest first; None: all numbers of heads, and
            hidden units in 16 steps, each down to none.
        **model_args: What the base is built with; ``img_size``, ``in_chans`` and ``num_classes`` of the base where they
            are not given.

    Raises:
        NarrowError: The base cannot be narrowed, or refuses the arguments.
        ValueError: The choices do not fit the base.
    """

    family = "elastic"
    arch_type = ElasticArch
    supernet = "vit_elastic_supernet"
    training_args = _OF_TRAINING

    def __init__(
        self, base: str = DEFAULT_BASE, choices: Sequence[Sequence[Sequence[int]]] | None = None, **model_args: Any
    ) -> None:
        cfg = base_cfg(base, "vit_elastic")
        channels, height, width = cfg.get("input_size", (3, 224, 224))
        model_args = {
            "img_size": (height, width),
            "in_chans": channels,
            "num_classes": cfg.get("num_classes", 1000),
            **model_args,
        }
        size = model_args["img_size"]
        model_args["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
        self.structure = structure = _structure(base, {**model_args, "img_size": list(model_args["img_size"])})
        self.base = base
        if choices is None:
            choices = [
                ((heads, 0) if attn.whole else tuple(range(heads, -1, -1)), hidden_choices(hidden))
                for (attn, _), (heads, hidden) in zip(structure.pairs, structure.widths, strict=True)
            ]
        self.choices = tuple((tuple(heads), tuple(hidden)) for heads, hidden in choices)
        _check_choices(self.choices, structure)
        genes = [
            Gene(name, options, stage=i)
            for i, pair in enumerate(self.choices)
            for name, options in zip(("num_heads", "mlp_hidden"), pair, strict=True)
        ]
        super().__init__(genes, list(self._places()), model_args)

    def _places(self) -> Iterator[Position]:
        def fixed(layer: Layer) -> Position:
            return Position((), lambda: layer)

        for part in self.structure.order():
            if isinstance(part, Layer):
                yield fixed(part)
            else:
                yield Position((2 * part[0] + part[1],), self.structure.pairs[part[0]][part[1]].layer)

    def choices_dict(self) -> dict[str, Any]:
        """See `SearchSpace.choices_dict`."""
        return {"base": self.base, "choices": self.choices}

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> ElasticSpace:
        """See `SearchSpace.from_choices`."""
        if unknown := sorted(set(data) - {"base", "choices"}):
            raise ValueError(f"an elastic space has a base and choices, not {', '.join(unknown):.80}")
        choices = data.get("choices")
        if choices is not None:
            _check_plain(choices)
        return cls(data.get("base", DEFAULT_BASE), choices, **model_args)

    def decode(self, rows: np.ndarray) -> list[ElasticArch]:
        """See `SearchSpace.decode`."""
        options = [gene.choices for gene in self.genes]
        archs = []
        for row in rows.tolist():
            values = [choice[i] for choice, i in zip(options, row, strict=True)]
            archs.append(ElasticArch(self.base, tuple(zip(values[::2], values[1::2], strict=True))))
        return archs

    def encode(self, arch: ElasticArch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if arch.base != self.base:
            raise ValueError(f"the network is a {arch.base}, those of the space are {self.base}")
        values = [n for pair in arch.widths for n in pair]
        if len(values) != len(self.genes):
            raise ValueError(f"networks of the space have {len(self.genes) // 2} blocks, this one {len(arch.widths)}")
        for i, (gene, value) in enumerate(zip(self.genes, values, strict=True)):
            if value not in gene.choices:
                raise ValueError(
                    f"block {i // 2}: {gene.name} {value} is not one of {', '.join(map(str, gene.choices))}"
                )
        return np.array([gene.choices.index(v) for gene, v in zip(self.genes, values, strict=True)], np.int8)


def _check_plain(choices: Any) -> None:
    def numbers(values: Any) -> bool:
        return isinstance(values, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in values)

    pairs = choices if isinstance(choices, list | tuple) else [None]
    if not all(isinstance(p, list | tuple) and len(p) == 2 and all(map(numbers, p)) for p in pairs):
        raise ValueError("choices of an elastic space are, for each block, numbers of heads and of hidden units")


def _check_choices(choices: Sequence[Any], structure: _Structure) -> None:
    if len(choices) != len(structure.pairs):
        raise ValueError(f"the base has {len(structure.pairs)} blocks, the choices are of {len(choices)}")
    for i, (pair, known) in enumerate(zip(choices, structure.pairs, strict=True)):
        for options, branch in zip(pair, known, strict=True):
            falling = all(a > b for a, b in itertools.pairwise(options))
            if not options or not falling or options[0] > branch.count or options[-1] < 0:
                raise ValueError(
                    f"block {i}: choices of {branch.kind} must fall from at most {branch.count} to at least 0, "
                    f"got {list(options)}"
                )
            if branch.whole and not set(options) <= {0, branch.count}:
                raise ValueError(f"block {i}: its heads are mixed, so that all {branch.count} or none can be there")


# -- layers of the supernet --------------------------------------------------------------------------------------------


class ElasticLayer(nn.Module):
    """In front of a timm attention or MLP class: computes with the first units, as many as are in force.

    Attributes:
        branch: Its units.
        in_force: Number of units for each of as many equal groups of the batch; None: all.
        reader: Repaired weights for any number of units, used while no gradients are asked for.
        repairing: While a network is repaired: collects corrections.
    """

    branch: Branch
    in_force: tuple[int, ...] | None
    reader: Reader | None
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
        with self._narrowed(keep):
            return super().forward(x, *args, **kwargs)

    @contextlib.contextmanager
    def _narrowed(self, keep: int, reader: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Attributes of the instance hide parameters and widths with those of the first units."""
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
        if self.reader is not None and self.reader.version != self.last.weight._version:
            self.reader = None
        if self.reader is None:
            return {}
        kept = self.reader.kept
        if keep not in kept:
            values = self.reader.at(keep * self.branch.width)
            kept[keep] = self._named(*values)
        return kept[keep]

    def _named(self, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        name, like = self.branch.units.parts[-1].param.removesuffix("weight"), self.last.weight
        named = {f"{name}weight": weight} if bias is None else {f"{name}weight": weight, f"{name}bias": bias}
        return {k: v.to(like).contiguous() for k, v in named.items()}

    def _repaired(self, x: torch.Tensor, keep: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Outputs of the repaired layer on all calibration images; the repair goes into `repairing`."""
        if keep in (0, self.branch.units.count):
            return self._at(keep, x, *args, **kwargs)
        moments, last = Moments(), self.last
        seen: list[torch.Tensor] = []
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        weight = first_units(last.weight, self.branch.units.parts[-1], keep)
        as_it_is = self._named(weight, last.bias)
        try:
            for part in x.split(REPAIR_ROWS):
                whole = super().forward(part, *args, **kwargs)
                seen.clear()
                with self._narrowed(keep, as_it_is):
                    missing = whole - super().forward(part, *args, **kwargs)
                moments.add(seen.pop(), missing)
        finally:
            handle.remove()
        more, shift = correction(moments, last.bias is not None)
        fixed = self._named(weight.double() + more, None if shift is None else last.bias.double() + shift)
        self.repairing.update(fixed)
        with self._narrowed(keep, fixed):
            return torch.cat([super(ElasticLayer, self).forward(p, *args, **kwargs) for p in x.split(REPAIR_ROWS)])


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
        _check_widths(arch, self.space.largest.widths)
        for i, (pair, (attn, _)) in enumerate(zip(arch.widths, self.space.structure.pairs, strict=True)):
            if attn.whole and pair[0] not in (0, attn.count):
                raise ArchError(f"block {i}: its heads are mixed, so that all {attn.count} or none can be there")

    def forward_one(self, h: torch.Tensor, arch: ElasticArch) -> Any:
        """See `Supernet.forward_one`."""
        return self.forward_groups(h, [arch], "sliced")

    def forward_groups(self, h: torch.Tensor, archs: Sequence[ElasticArch], mode: str) -> Any:
        """See `Supernet.forward_groups`."""
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
        """
        layers = [layer for layer in self.elastic_layers() if layer.branch.units.count]
        moments = [Moments() for _ in layers]
        handles = [
            layer.last.register_forward_pre_hook(lambda _, inputs, m=m: m.add(inputs[0]))
            for layer, m in zip(layers, moments, strict=True)
        ]
        training, active = self.training, self.active
        self.eval().set_arch(None)
        for images in batches:
            self(images)
        for handle in handles:
            handle.remove()
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
        self.train(training).set_arch(active)

    @torch.no_grad()
    def repaired(self, arch: ElasticArch, images: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Repaired weights of a sub-network by name, see `extract`."""
        layers, found = self.elastic_layers(), {}
        if images is None:
            for layer, keep in zip(layers, (n for pair in arch.widths for n in pair), strict=True):
                if layer.reader is not None and 0 < keep < layer.branch.units.count:
                    found.update(layer.read_by(keep))
            return found
        training = self.training
        self.eval()
        try:
            for layer in layers:
                layer.repairing = found
            self.forward_groups(images, [arch], "sliced")
        finally:
            for layer in layers:
                layer.repairing = None
            self.train(training)
        return found


def _as_supernet(model: nn.Module, space: ElasticSpace) -> ElasticSupernet:
    model.__class__ = _front(ElasticSupernet, type(model))
    model.set_space(space)
    model.set_layers()
    return model


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
    if widths is not None:
        space = ElasticSpace(
            base, _within(space, ElasticArch.from_args({"base": base, "widths": widths})), **json_plain
        )
    net = timm.create_model(
        space.supernet, space=space.to_dict(), pretrained_cfg={**cfg, "architecture": space.supernet}
    )
    net.load_state_dict(model.state_dict())
    param = next(model.parameters())
    return net.to(param.device, param.dtype).train(model.training)


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
    if isinstance(space, SearchSpace):
        raise ValueError("space must be JSON-plain so that the model can be saved; pass space.to_dict()")
    opened = ElasticSpace() if space is None else SearchSpace.from_dict(space)
    if not isinstance(opened, ElasticSpace):
        raise ValueError(f"the space of vit_elastic_supernet is an elastic one, got one of {opened.family!r}")
    args = {k: kwargs.pop(k, v) for k, v in opened.model_args.items()}
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = base_cfg(opened.base, "vit_elastic_supernet")

    def build(**given: Any) -> ElasticSupernet:
        whole = opened.largest.widths == opened.structure.widths
        model = create_base(opened.base, None if whole else opened.largest.widths, **given)
        return _as_supernet(model, opened.at(**{k: v for k, v in given.items() if k in args}))

    return build_model_with_cfg(
        build,
        "vit_elastic_supernet",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **args,
        **kwargs,
    )
