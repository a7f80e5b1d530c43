"""Networks and search spaces of EfficientFormer, and what those of its second version share with them.

Paper: "EfficientFormer: Vision Transformers at MobileNet Speed" - https://arxiv.org/abs/2206.01191. Neither the paper's
supernet nor its widths and depths were released; the presets are ours, and contain the published networks.

Each stage has a width. Each of its blocks is there or not (the paper's identity), but for the first ones, which always
are. Blocks that attend stand at the end of a stage: the gene ``num_vit`` counts from its last place, so that a step
down makes the first of them one that pools. In the paper's results and in timm's class these are in the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from ..arch import Arch, Layer
from ..models.efficientformer_nas import (
    HEADS,
    KEY_DIM,
    MAX_BLOCKS,
    STAGES,
    STRIDE,
    VALUE_DIM,
    check_depths,
    check_num_vit,
    check_ratio,
    check_size,
    check_widths,
    plain_depths,
)
from ..nas.space import MAX_CHOICES, Gene, Position, SearchSpace

__all__ = ["EfficientFormerArch", "EfficientFormerSpace", "StageSpace"]

RATES = ("drop_rate", "proj_drop_rate", "drop_path_rate")
_DEFAULTS = dict(depths=(3, 2, 6, 4), embed_dims=(48, 96, 224, 448), num_vit=1)


# -- layers ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 12)
def stem(height: int, width: int, in_chans: int, held: int, dim: int) -> Layer:
    """Two convolutions of stride 2 with batch norm, of an image of this size; ``held``: maps of the first at once."""
    middle, half, whole = dim // 2, height * width // 4, height * width // 16
    return Layer.of(
        "stem",
        height=height,
        width=width,
        in_chans=in_chans,
        held=held,
        dim=dim,
        macs=9 * (in_chans * middle * half + middle * dim * whole),
        params=9 * middle * (in_chans + dim) + 3 * (middle + dim),
        memory=held * middle * half,
    )


@lru_cache(maxsize=1 << 16)
def reduction(height: int, width: int, in_dim: int, dim: int) -> Layer:
    """Convolution of stride 2 with batch norm, to a map of this size."""
    area = height * width
    return Layer.of(
        "reduction",
        height=height,
        width=width,
        in_dim=in_dim,
        dim=dim,
        macs=9 * in_dim * dim * area,
        params=dim * (9 * in_dim + 3),
        memory=(4 * in_dim + 2 * dim) * area,
    )


@lru_cache(maxsize=1 << 16)
def pooling(height: int, width: int, hidden: int, dim: int) -> Layer:
    """4-D block: pooling as token mixer, convolutional MLP with batch norm."""
    area = height * width
    return Layer.of(
        "pooling_block",
        height=height,
        width=width,
        dim=dim,
        hidden=hidden,
        macs=2 * dim * hidden * area,
        params=hidden * (2 * dim + 3) + 5 * dim,
        # batch norm or activation: input, sum; hidden before and after. Output: also what goes into the sum
        memory=max(2 * dim + 2 * hidden, 3 * dim + hidden, 4 * dim) * area,
    )


@lru_cache(maxsize=1 << 16)
def attending(height: int, width: int, hidden: int, dim: int) -> Layer:
    """3-D block: attention with relative positions, MLP, layer norms."""
    tokens, keys, values = height * width, HEADS * KEY_DIM, HEADS * VALUE_DIM
    return Layer.of(
        "attention_block",
        height=height,
        width=width,
        dim=dim,
        hidden=hidden,
        macs=tokens * (dim * (2 * keys + 2 * values + 2 * hidden) + tokens * (keys + values)),
        params=dim * (2 * keys + 2 * values + 2 * hidden + 8) + 2 * keys + values + hidden + HEADS * tokens,
        memory=tokens
        * max(
            # input, norm, joint projection; logits before and after a step, or weights, values and their sum
            2 * dim + 2 * keys + values + max(2 * HEADS * tokens, 2 * values + HEADS * tokens),
            3 * dim + 2 * hidden,
            4 * dim + hidden,
        ),
    )


@lru_cache(maxsize=1 << 12)
def head(height: int, width: int, num_classes: int, heads: int, dim: int) -> Layer:
    """Final norm and classifiers."""
    return Layer.of(
        "head",
        height=height,
        width=width,
        num_classes=num_classes,
        heads=heads,
        dim=dim,
        macs=heads * dim * num_classes,
        params=2 * dim + heads * (dim + 1) * num_classes,
        memory=2 * dim * height * width,
    )


def hidden_units(dim: int, mlp_ratio: float) -> int:
    """As timm counts them."""
    return int(dim * mlp_ratio)


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EfficientFormerArch(Arch):
    """A network of the family.

    Attributes:
        embed_dims: Channels of each stage.
        depths: For each stage 1 for a block, 0 for one that its supernet has there and it has not.
        num_vit: Blocks at the end of the last stage that attend.
    """

    model: ClassVar[str] = "efficientformer_nas"
    embed_dims: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    num_vit: int

    def args(self) -> dict[str, Any]:
        """See `Arch.args`."""
        return dict(depths=plain_depths(self.depths), embed_dims=list(self.embed_dims), num_vit=self.num_vit)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> EfficientFormerArch:
        """See `Arch.from_args`; what is missing is that of the entry point."""
        args = {**_DEFAULTS, **args}
        depths = check_depths(args["depths"])
        return cls(check_widths(args["embed_dims"]), depths, check_num_vit(args["num_vit"], sum(depths[-1])))

    def canonical(self) -> EfficientFormerArch:
        """See `Arch.canonical`."""
        return EfficientFormerArch(self.embed_dims, whole(self.depths), self.num_vit)

    def layers(
        self,
        img_size: Any = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratios: float = 4.0,
        **_: Any,
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`."""
        makers = _makers(img_size, in_chans, num_classes, mlp_ratios)
        kinds = [[0] * sum(flags) for flags in self.depths]
        kinds[-1][len(kinds[-1]) - self.num_vit :] = [1] * self.num_vit
        blocks = [
            [partial(make, dim, attends=bool(kind)) for kind in stage]
            for make, dim, stage in zip(makers.blocks, self.embed_dims, kinds, strict=True)
        ]
        return assemble(makers, self.embed_dims, blocks)


def whole(depths: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The same numbers of blocks, none absent."""
    return tuple((1,) * sum(flags) for flags in depths)


@dataclass(frozen=True)
class Makers:
    """What makes the layers of a network at given model arguments.

    Attributes:
        stem: By width.
        reductions: By width before and after, in front of each stage but the first.
        blocks: Of each stage, by the width and what else decides a block.
        head: By width.
    """

    stem: Callable[[int], Layer]
    reductions: Sequence[Callable[[int, int], Layer]]
    blocks: Sequence[Callable[..., Layer]]
    head: Callable[[int], Layer]


def assemble(makers: Makers, dims: Sequence[int], blocks: Sequence[Sequence[Callable[[], Layer]]]) -> tuple[Layer, ...]:
    """The layers of a network in the order of its forward."""

    def layers() -> Iterator[Layer]:
        yield makers.stem(dims[0])
        for i, stage in enumerate(blocks):
            if i:
                yield makers.reductions[i - 1](dims[i - 1], dims[i])
            yield from (make() for make in stage)
        yield makers.head(dims[-1])

    return tuple(layers())


def grids(img_size: Any) -> list[tuple[int, int]]:
    """Height and width of each stage's maps."""
    height, width = check_size(img_size)
    return [(height // s, width // s) for s in (STRIDE // 8, STRIDE // 4, STRIDE // 2, STRIDE)]


def _block(grid: tuple[int, int], mlp_ratio: float, dim: int, attends: bool) -> Layer:
    return (attending if attends else pooling)(*grid, hidden_units(dim, mlp_ratio), dim)


def _makers(img_size: Any, in_chans: int, num_classes: int, mlp_ratios: float) -> Makers:
    sizes = grids(img_size)
    return Makers(
        partial(stem, *check_size(img_size), in_chans, 2),  # before and after batch norm or activation
        [partial(reduction, *grid) for grid in sizes[1:]],
        [partial(_block, grid, mlp_ratios) for grid in sizes],
        partial(head, *sizes[-1], num_classes, 2),
    )


# -- spaces ------------------------------------------------------------------------------------------------------------


class StageSpace(SearchSpace):
    """Networks of four stages, each with its width and with blocks that may be absent.

    Columns of stage i: ``widths[i]``; ``places[i]``, for each place of a block the columns of its presence (None: it is
    always there) and of its MLP ratio (None: the space has one for all); ``vits[i]``, of the number of blocks that
    attend, where the stage has such blocks.

    Args:
        embed_dims: Widths of each stage.
        depths: Places for blocks in each stage.
        min_depths: Blocks of each stage that are always there, its first ones.
        num_vit: Most blocks that attend, of each stage in ``vit_stages``.
        mlp_ratios: Choices of each block's MLP ratio in each stage; None: it is not searched.
        makers: What makes the layers.
        model_args: See `SearchSpace`.

    Raises:
        ValueError: A list of choices is empty, too long, or holds a value twice or of another kind; numbers do not fit
            each other.
    """

    vit_stages: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        embed_dims: Sequence[Sequence[int]],
        depths: Sequence[int],
        min_depths: Sequence[int],
        num_vit: Sequence[int],
        mlp_ratios: Sequence[Sequence[float]] | None,
        makers: Makers,
        model_args: Mapping[str, Any],
    ) -> None:
        self.depths, self.min_depths = _check_numbers("depths", depths), _check_numbers("min_depths", min_depths)
        if any(least > most for least, most in zip(self.min_depths, self.depths, strict=True)):
            raise ValueError(f"min_depths {list(self.min_depths)} must be no more than depths {list(self.depths)}")
        lists = _check_lists("embed_dims", embed_dims)
        for i, choices in enumerate(lists):
            for dim in choices:  # says what is wrong with a number
                check_widths([dim if j == i else 2 for j in range(STAGES)])
        for n, i in zip(num_vit, self.vit_stages, strict=True):
            check_num_vit(n, self.depths[i], f"stage {i}")
        self.most_vit = dict(zip(self.vit_stages, num_vit, strict=True))
        ratios = None
        if mlp_ratios is not None:
            lists_of_ratios = _check_lists("mlp_ratios", mlp_ratios)
            self.mlp_ratios = ratios = [tuple(map(check_ratio, choices)) for choices in lists_of_ratios]

        genes: list[Gene] = []

        def add(*args: Any, **kwargs: Any) -> int:
            genes.append(Gene(*args, **kwargs))
            return len(genes) - 1

        self.widths: list[int] = []
        self.vits: dict[int, int] = {}
        self.places: list[list[tuple[int | None, int | None]]] = []
        positions = []
        for i, choices in enumerate(lists):
            self.widths.append(add("embed_dim", choices, kind="width", stage=i))
            if i:
                positions.append(Position((self.widths[i - 1], self.widths[i]), makers.reductions[i - 1]))
            else:
                positions.append(Position((self.widths[0],), makers.stem))
            if i in self.most_vit:
                counts = tuple(range(self.most_vit[i], -1, -1))
                self.vits[i] = add("num_vit", counts, kind="width", stage=i)
            self.places.append([])
            for p in range(self.depths[i]):
                exists = ratio = None
                if p >= self.min_depths[i]:
                    exists = add("exists", (True, False), kind="presence", entries=(0, 0, 1), stage=i)
                if ratios is not None:
                    ratio = add("mlp_ratio", ratios[i], presence=exists, stage=i)
                self.places[i].append((exists, ratio))
                columns = [("dim", self.widths[i])]
                columns += [(n, c) for n, c in (("exists", exists), ("mlp_ratio", ratio)) if c is not None]
                end = self.depths[i] - p  # attends where this many do
                if end <= self.most_vit.get(i, 0):
                    columns.append(("num_vit", self.vits[i]))
                names, genes_of = zip(*columns, strict=True)
                make = makers.blocks[i]
                positions.append(Position(genes_of, partial(_place, make, names, end, i in self.most_vit)))
        positions.append(Position((self.widths[-1],), makers.head))
        super().__init__(genes, positions, model_args)

    def normalise(self, rows: np.ndarray) -> np.ndarray:
        """See `SearchSpace.normalise`; no absent block counts as one that attends."""
        super().normalise(rows)
        for i, column in self.vits.items():
            first = self.depths[i] - self.most_vit[i]
            for k, (exists, _) in enumerate(self.places[i][first:]):
                if exists is not None:
                    rows[:, column] += (rows[:, column] == k) & (rows[:, exists] != 0)
        return rows

    def size(self) -> int:
        """See `SearchSpace.size`."""
        total = 1
        for i, places in enumerate(self.places):
            present = [1 if ratio is None else len(self.genes[ratio].choices) for _, ratio in places]
            ways = [n + (exists is not None) for n, (exists, _) in zip(present, places, strict=True)]
            stage = math.prod(ways)
            # the first block that attends, which is there
            for p in range(self.depths[i] - self.most_vit.get(i, 0), self.depths[i]):
                stage += present[p] * math.prod(w for q, w in enumerate(ways) if q != p)
            total *= stage * len(self.genes[self.widths[i]].choices)
        return total

    def stages_of(self, row: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...], tuple[float, ...], int]]:
        """(width, depths, MLP ratios, blocks that attend) of each stage of a normalised row."""
        for i, places in enumerate(self.places):
            flags = [exists is None or not row[exists] for exists, _ in places]
            ratios = [
                self.genes[r].choices[row[r]] for (_, r), f in zip(places, flags, strict=True) if f and r is not None
            ]
            vits = self.genes[self.vits[i]].choices[row[self.vits[i]]] if i in self.vits else 0
            last = max(p for p, there in enumerate(flags) if there)
            attends = sum(flags[len(flags) - vits :]) if vits else 0
            dim = self.genes[self.widths[i]].choices[row[self.widths[i]]]
            yield dim, tuple(map(int, flags[: last + 1])), tuple(ratios), attends

    def row_of(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[Sequence[int]],
        num_vits: Mapping[int, int],
        mlp_ratios: Sequence[Sequence[float]] | None = None,
    ) -> np.ndarray:
        """Inverse of `stages_of`.

        Raises:
            ValueError: The network is not of this space.
        """
        row = np.zeros(len(self.genes), np.int8)
        for i, (dim, flags) in enumerate(zip(embed_dims, depths, strict=True)):
            row[self.widths[i]] = self._find(self.widths[i], dim, f"stage {i}")
            if len(flags) > self.depths[i]:
                raise ValueError(f"stage {i}: the space has {self.depths[i]} places for blocks, not {len(flags)}")
            there = [bool(f) for f in flags] + [False] * (self.depths[i] - len(flags))
            ratios = iter(mlp_ratios[i] if mlp_ratios is not None else ())
            for p, (exists, ratio) in enumerate(self.places[i]):
                if there[p]:
                    if ratio is not None:
                        row[ratio] = self._find(ratio, next(ratios), f"stage {i}, block {p}")
                elif exists is None:
                    raise ValueError(f"stage {i}: block {p} is always there in this space")
                else:
                    row[exists] = 1
            if i in self.vits:
                present = [p for p, f in enumerate(there) if f]
                count = num_vits[i]
                first = present[len(present) - count] if count else self.depths[i]
                index = first - (self.depths[i] - self.most_vit[i])
                if index < 0:
                    raise ValueError(
                        f"stage {i}: block {first} attends, which in this space the last {self.most_vit[i]} places can"
                    )
                row[self.vits[i]] = index
        return row

    def _find(self, column: int, value: float, where: str) -> int:
        gene = self.genes[column]
        if value not in gene.choices:
            known = ", ".join(map(str, gene.choices))
            raise ValueError(f"{where}: {gene.name} {value} is not one of the space's choices {known}")
        return gene.choices.index(value)


def _place(
    make: Callable[..., Layer], names: tuple[str, ...], end: int, may_attend: bool, *values: Any
) -> Layer | None:
    """The layer of a place, ``end`` places from the end of its stage."""
    own = dict(zip(names, values, strict=True))
    if not own.pop("exists", True):
        return None
    vits = own.pop("num_vit", 0)
    return make(own.pop("dim"), *own.values(), attends=may_attend and end <= vits)


class EfficientFormerSpace(StageSpace):
    """EfficientFormer networks.

    Args:
        embed_dims: Widths of each stage.
        depths: Most blocks of each stage.
        min_depths: Blocks of each stage that are always there, its first ones.
        num_vit: Most blocks of the last stage that attend.
        **model_args: Arguments that models of the space are built with: ``img_size``, ``in_chans``, ``num_classes``,
            ``mlp_ratios``, ``layer_scale_init_value``, drop rates.

    Raises:
        ValueError: See `StageSpace`; an argument is unknown or malformed.
    """

    family = "efficientformer"
    arch_type = EfficientFormerArch
    supernet = "efficientformer_supernet"
    training_args = ("layer_scale_init_value", *RATES)
    vit_stages = (STAGES - 1,)
    mixes = True
    largest: EfficientFormerArch
    smallest: EfficientFormerArch

    def __init__(
        self,
        embed_dims: Sequence[Sequence[int]],
        depths: Sequence[int],
        min_depths: Sequence[int] = (1, 1, 1, 1),
        num_vit: int = 0,
        **model_args: Any,
    ) -> None:
        args = check_model_args({**DEFAULT_ARGS, "mlp_ratios": 4.0, **model_args})
        makers = _makers(*(args[name] for name in ("img_size", "in_chans", "num_classes", "mlp_ratios")))
        super().__init__(embed_dims, depths, min_depths, (num_vit,), None, makers, args)

    def choices_dict(self) -> dict[str, Any]:
        """See `SearchSpace.choices_dict`."""
        return dict(
            embed_dims=[self.genes[c].choices for c in self.widths],
            depths=self.depths,
            min_depths=self.min_depths,
            num_vit=self.most_vit[STAGES - 1],
        )

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> EfficientFormerSpace:
        """See `SearchSpace.from_choices`."""
        check_keys(data, {"embed_dims", "depths"}, {"min_depths", "num_vit"}, "an EfficientFormer space")
        return cls(**data, **model_args)

    def decode(self, rows: np.ndarray) -> list[EfficientFormerArch]:
        """See `SearchSpace.decode`."""
        archs = []
        for row in rows.tolist():
            dims, depths, _, vits = zip(*self.stages_of(row), strict=True)
            archs.append(EfficientFormerArch(dims, depths, vits[-1]))
        return archs

    def encode(self, arch: Arch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if not isinstance(arch, EfficientFormerArch):
            raise ValueError(f"expected an EfficientFormerArch, got a {type(arch).__name__}")
        return self.row_of(arch.embed_dims, arch.depths, {STAGES - 1: arch.num_vit})


# -- checking ----------------------------------------------------------------------------------------------------------


DEFAULT_ARGS = dict(img_size=224, in_chans=3, num_classes=1000, layer_scale_init_value=1e-5)


def check_model_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments of a space.

    Raises:
        ValueError: One is unknown or malformed.
    """
    clean: dict[str, Any] = {}
    for name, value in args.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "img_size":
            good, want, value = True, "", check_size(value)
        elif name == "mlp_ratios":
            good, want = True, str(check_ratio(value))
        elif name == "distillation":
            good, want = isinstance(value, bool), "true or false"
        elif name == "layer_scale_init_value":
            good, want = number and 0 < value <= 1, "a number above 0 and up to 1"
        elif name in RATES:
            good, want = number and 0 <= value < 1, "a number from 0 to below 1"
        elif name in ("in_chans", "num_classes"):
            least = int(name == "in_chans")
            good = number and isinstance(value, int) and least <= value <= 1 << 16
            want = f"an integer from {least} to {1 << 16}"
        else:
            known = ", ".join((*DEFAULT_ARGS, *RATES))
            raise ValueError(f"unknown model argument {name!r:.60} of a search space; known: {known}")
        if not good:
            raise ValueError(f"{name} must be {want}, got {value!r:.40}")
        clean[name] = value
    return clean


def check_keys(data: Mapping[str, Any], needed: set[str], others: set[str], what: str) -> None:
    """Whether choices have the right names.

    Raises:
        ValueError: Some are missing or unknown.
    """
    if not needed <= set(data) <= needed | others:
        got = ", ".join(map(str, list(data)[:8]))
        raise ValueError(f"{what} has {', '.join(sorted(needed | others))}; got {got:.200}")


def _check_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Blocks of each stage."""
    good = isinstance(values, list | tuple) and len(values) == STAGES
    if not good or not all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MAX_BLOCKS for v in values):
        raise ValueError(f"{name} must be {STAGES} integers from 1 to {MAX_BLOCKS}, got {values!r:.80}")
    return tuple(values)


def _check_lists(name: str, lists: Any) -> list[tuple]:
    """Choices of each stage, largest first."""
    if not isinstance(lists, list | tuple) or len(lists) != STAGES:
        raise ValueError(f"{name} must be {STAGES} lists of choices, got {lists!r:.80}")
    clean = []
    for i, values in enumerate(lists):
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_CHOICES:
            raise ValueError(f"{name} of stage {i} must be a list of 1 to {MAX_CHOICES} numbers, got {values!r:.80}")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise ValueError(f"{name} of stage {i} must be a list of numbers, got {values!r:.80}")
        if len(set(values)) != len(values):
            raise ValueError(f"{name} of stage {i} holds a choice twice: {list(values)}")
        clean.append(tuple(sorted(values, reverse=True)))
    return clean


# -- presets -----------------------------------------------------------------------------------------------------------


# a layer scale that a short training need not grow first
MICRO_ARGS: dict[str, Any] = dict(img_size=64, num_classes=10, layer_scale_init_value=0.1)

EfficientFormerSpace.presets = {
    # L1, L3 and L7 among them; widths in the paper's steps of 16
    "efficientformer": partial(
        EfficientFormerSpace,
        embed_dims=[list(range(most, least - 1, -16)) for most, least in ((96, 48), (192, 96), (384, 224), (768, 448))],
        depths=(6, 6, 18, 8),
        min_depths=(1, 1, 1, 1),
        num_vit=8,
    ),
    # images of 64 px on a CPU
    "efficientformer_micro": partial(
        EfficientFormerSpace,
        embed_dims=[[24, 16], [48, 40, 32, 24], [96, 80, 64, 48], [160, 128, 96, 64]],
        depths=(2, 2, 4, 4),
        min_depths=(1, 1, 1, 1),
        num_vit=3,
        **MICRO_ARGS,
    ),
}
