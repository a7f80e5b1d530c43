"""The narrower forms of a timm vision transformer: what each costs, and which there are.

Costs are counted once for each base on the meta device; a network's are then sums over its layers.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..arch import Arch, ArchError, Layer
from ..models.narrow import Branch, NarrowError, branches, check_head_dim
from ..models.vit_elastic import DEFAULT_BASE, base_cfg, check_base, create_base
from ..nas.cost import Budget
from ..nas.count import count_modules
from ..nas.space import Gene, Position, SearchSpace

__all__ = [
    "OF_TRAINING",
    "BlockBranch",
    "ElasticArch",
    "ElasticSpace",
    "check_pairs",
    "check_widths",
    "hidden_choices",
    "structure_of",
]

HIDDEN_STEPS = 16  # choices of hidden units in a block
HIDDEN_MULTIPLE = 8  # kernels are slow at odd widths

Widths = tuple[tuple[int, ...], ...]  # (heads, hidden units) of each block, or (heads, hidden units, head_dim)


# -- what a base consists of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockBranch:
    """Attention or MLP of a block of a base, and its cost for any number of units."""

    kind: str
    tokens: int
    dim: int
    count: int
    width: int
    whole: bool
    entries: bool  # whether heads can be of fewer entries
    runs: int  # values that each unit computes: 3 for query, key and value
    macs: tuple[int, int]  # beside the units, and of each
    params: tuple[int, int]

    def layer(self, keep: int, head_dim: int | None = None) -> Layer | None:
        if keep == 0:
            return None
        width = head_dim or self.width
        inner = keep * width
        params_each, macs_each = (n * width // self.width for n in (self.params[1], self.macs[1]))
        params = self.params[0] + keep * params_each
        if self.kind == "attention":
            shape = dict(num_heads=keep, head_dim=width)
            memory = self.tokens * (3 * self.dim + (self.runs + 1) * inner)
        else:
            shape = dict(hidden=keep)
            memory = self.tokens * max(3 * self.dim + 2 * self.runs * inner, 4 * self.dim + inner)
        macs = self.macs[0] + keep * macs_each
        return Layer.of(
            self.kind,
            tokens=self.tokens,
            dim=self.dim,
            # these tell layers of one shape with and without biases, norms and gates apart
            params_beside=self.params[0],
            params_each=params_each,
            macs=macs,
            params=params,
            memory=memory,
            **shape,
        )


@dataclass(frozen=True)
class _Structure:
    """A base at some model arguments: its branches, and the layers that stay; how many tokens are no patches."""

    prefix: int
    stem: Layer
    pairs: tuple[tuple[BlockBranch, BlockBranch], ...]
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


OF_TRAINING = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def structure_of(base: str, model_args: Mapping[str, Any]) -> _Structure:
    """Counted on the meta device: no weights are made.

    Raises:
        NarrowError: See `vit_elastic`; or the base refuses the arguments.
    """
    kept = {k: v for k, v in model_args.items() if k not in OF_TRAINING}
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

    def branch(b: Branch) -> BlockBranch:
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
        return BlockBranch(
            b.kind, *tokens[name], count, b.width, b.whole, b.entries, runs,
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
    return _Structure(getattr(full, "num_prefix_tokens", 0), stem, found, between, ending)


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
        widths: (num_heads, mlp_hidden) of each block, or (num_heads, mlp_hidden, head_dim) where heads have fewer
            entries than the base's; 0: that branch is absent.
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
            good = isinstance(pair, list | tuple) and len(pair) in (2, 3)
            if not good or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 1 << 20 for n in pair):
                raise ArchError(f"widths[{i}] must be [num_heads, mlp_hidden], or these and head_dim, got {pair!r:.60}")
        return cls(base, tuple(map(tuple, widths)))

    def key(self) -> str:
        """See `Arch.key`."""
        return "|".join(",".join(map(str, own)) for own in self.widths)

    def layers(
        self, img_size: Any = 224, in_chans: int = 3, num_classes: int = 1000, **model_args
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`; ``model_args`` are the base's own."""
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        known = {"img_size": size, "in_chans": in_chans, "num_classes": num_classes, **model_args}
        try:
            structure = structure_of(self.base, known)
        except NarrowError as e:
            raise ArchError(str(e)) from None
        check_widths(self, structure.widths)
        found: list[Layer | None] = []
        for part in structure.order():
            if isinstance(part, Layer):
                found.append(part)
                continue
            block, which = part
            branch, (*keep, head_dim) = structure.pairs[block][which], (*self.widths[block], None)[:3]
            if which == 0 and head_dim is not None and branch.count:
                try:
                    check_head_dim(f"block {block}", branch.width, branch.entries, head_dim)
                except NarrowError as e:
                    raise ArchError(str(e)) from None
            found.append(branch.layer(keep[which], head_dim if which == 0 else None))
        return tuple(layer for layer in found if layer is not None)


def check_widths(arch: ElasticArch, limit: Widths) -> None:
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
    training_args = OF_TRAINING

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
        self.structure = structure = structure_of(base, {**model_args, "img_size": list(model_args["img_size"])})
        self.base = base
        if choices is None:
            choices = [
                ((heads, 0) if attn.whole else tuple(range(heads, -1, -1)), hidden_choices(hidden))
                for (attn, _), (heads, hidden) in zip(structure.pairs, structure.widths, strict=True)
            ]
        self.choices = tuple((tuple(heads), tuple(hidden)) for heads, hidden in choices)
        _check_choices(self.choices, structure)
        super().__init__(list(self._genes()), list(self._places()), model_args)

    def _genes(self) -> Iterator[Gene]:
        for i, pair in enumerate(self.choices):
            for name, options in zip(("num_heads", "mlp_hidden"), pair, strict=True):
                yield Gene(name, options, stage=i)

    def _places(self) -> Iterator[Position]:
        def fixed(layer: Layer) -> Position:
            return Position((), lambda: layer)

        for part in self.structure.order():
            yield fixed(part) if isinstance(part, Layer) else self._place(*part)

    def _place(self, block: int, which: int) -> Position:
        """Attention (0) or MLP (1) of a block."""
        return Position((2 * block + which,), self.structure.pairs[block][which].layer)

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
        return list(map(self.of_widths, self.widths_of(rows)))

    def of_widths(self, widths: Widths) -> ElasticArch:
        """The network of these widths, with all tokens."""
        return ElasticArch(self.base, widths)

    def even(self, budget: Budget) -> ElasticArch | None:
        """The cut that one would make by hand: of all blocks the same share of the heads and of the hidden units.

        The two shares are as near to each other as a network allows that uses 97.5% (or the budget's own band) of the
        first limit, or where none can, of another one; for heads are coarse. Heads that can only be there all or not at
        all (CaiT's) stay, and do not count. Hidden units are multiples of 8 that need not be among the choices, and
        some blocks have 8 more than others; where latency is limited, they are among the choices, for which it is
        known. No branch is left out but those that the largest network lacks.

        Returns:
            None where such a cut cannot be within the budget.

        Raises:
            BudgetError: The space has no price for what the budget limits.
        """
        measured = "latency_ms" in budget.limits
        ladders = []
        for heads, hidden in self.choices:
            multiple = HIDDEN_MULTIPLE if hidden[0] >= HIDDEN_STEPS * HIDDEN_MULTIPLE else 1
            units = hidden if measured else (*range(0, hidden[0], multiple), hidden[0])
            ladders.append([sorted(n for n in options if n) or [0] for options in (heads, units)])
        heads, hidden = zip(*ladders, strict=True)

        def at(numbers: Sequence[Sequence[int]], share: float) -> tuple[int, ...]:
            return tuple(max([own[0], *(n for n in own if n <= share * own[-1])]) for own in numbers)

        def within(attention: Sequence[int], mlp: Sequence[int]) -> ElasticArch | None:
            arch = self.of_widths(tuple(zip(attention, mlp, strict=True)))
            return arch if all(self.cost_of(arch, name) <= limit for name, limit in budget) else None

        lower = max(budget.lower, Budget(**budget.limits).lower)
        found: list[tuple[tuple, ElasticArch]] = []
        shares = np.linspace(0, 1, 257).tolist()
        for attention in dict.fromkeys(at(heads, share) for share in shares):
            fits = bisect.bisect_left(shares, True, key=lambda share: within(attention, at(hidden, share)) is None)
            if fits == 0:
                continue
            mlp = list(at(hidden, shares[fits - 1]))
            for block, own in enumerate(hidden):  # what is left of the budget
                wider = [*mlp[:block], next((n for n in own if n > mlp[block]), mlp[block]), *mlp[block + 1 :]]
                mlp = wider if within(attention, wider) else mlp
            arch = within(attention, mlp)
            used = [self.cost_of(arch, name) / limit for name, limit in budget]
            kept = [_share_kept(own, most) for own, most in ((attention, heads), (mlp, hidden))]
            near = 2 if used[0] >= lower else max(used) >= lower
            found.append(((near, -abs(kept[0] - kept[1]) if near else used[0]), arch))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def widths_of(self, rows: np.ndarray) -> Iterator[Widths]:
        """Heads and hidden units of each row."""
        options = [choices for pair in self.choices for choices in pair]
        for row in rows[:, : len(options)].tolist():
            values = [choice[i] for choice, i in zip(options, row, strict=True)]
            yield tuple(zip(values[::2], values[1::2], strict=True))

    def encode(self, arch: ElasticArch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if arch.base != self.base:
            raise ValueError(f"the network is a {arch.base}, those of the space are {self.base}")
        check_pairs(arch)
        values = [n for pair in arch.widths for n in pair]
        genes = self.genes[: 2 * len(self.choices)]
        if len(values) != len(genes):
            raise ValueError(f"networks of the space have {len(self.choices)} blocks, this one {len(arch.widths)}")
        for i, (gene, value) in enumerate(zip(genes, values, strict=True)):
            if value not in gene.choices:
                raise ValueError(
                    f"block {i // 2}: {gene.name} {value} is not one of {', '.join(map(str, gene.choices))}"
                )
        return np.array([gene.choices.index(v) for gene, v in zip(genes, values, strict=True)], np.int8)


def _share_kept(numbers: Sequence[int], ladders: Sequence[Sequence[int]]) -> float:
    """Of what could be fewer, 1 where nothing could."""
    free = [(n, own[-1]) for n, own in zip(numbers, ladders, strict=True) if len(own) > 1]
    return sum(n for n, _ in free) / sum(most for _, most in free) if free else 1.0


def check_pairs(arch: ElasticArch) -> None:
    """Raises:
    ArchError: The heads of a network have their own number of entries, which no supernet varies.
    """
    if any(len(own) > 2 for own in arch.widths):
        raise ArchError(
            "a supernet varies heads and hidden units, not head_dim; widths must be [num_heads, mlp_hidden]"
        )


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
