"""The elastic vision transformer with tokens as genes: how many patches go on is searched with heads and hidden units.

At some blocks the patches that matter least to the class token are dropped, a fixed number of them (`vit_tokens` of the
method ``ats`` with ``keep_ratios``), so that costs are exact and nothing has to be trained first. `with_tokens` makes
such a supernet of an elastic one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..arch import Arch, ArchError, Layer
from ..models.token_layers import kept_of
from ..models.token_reduction import AdaptiveTokenSampling, TokenError, reduce_in_place
from ..models.vit_elastic import DEFAULT_BASE, create_base, default_cfg
from ..nas.space import Gene, Position
from .elastic import REPAIR_ROWS, ElasticSupernet, build_supernet, supernet_over
from .elastic_space import BlockBranch, ElasticArch, ElasticSpace, Widths, structure_of

__all__ = ["KEEP_RATIOS", "TokenArch", "TokenSpace", "TokenSupernet", "with_tokens"]

KEEP_RATIOS = (1.0, 0.9, 0.7, 0.5)
METHOD = AdaptiveTokenSampling.method


@dataclass(frozen=True)
class TokenArch(ElasticArch):
    """An elastic vision transformer that drops patches.

    Attributes:
        blocks: Numbers of the blocks that may drop some.
        keep_ratios: Share of the first number of patches that leaves each of them, none higher than the one before.
    """

    model: ClassVar[str] = "vit_tokens"
    blocks: tuple[int, ...] = ()
    keep_ratios: tuple[float, ...] = ()

    def args(self) -> dict[str, Any]:
        """See `Arch.args`."""
        return {
            **super().args(),
            "method": METHOD,
            "blocks": list(self.blocks),
            "keep_ratios": list(self.keep_ratios),
        }

    @classmethod
    def describes(cls, args: Mapping[str, Any]) -> bool:
        """See `Arch.describes`: those of trained predictors, and of numbers that each image decides, are not."""
        return args.get("method") == METHOD and None not in (args.get("widths"), args.get("keep_ratios"))

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> TokenArch:
        """See `Arch.from_args`."""
        plain = ElasticArch.from_args(args)
        if args.get("method") != METHOD:
            raise ArchError(f"method must be {METHOD!r}, with keep_ratios; got {args.get('method')!r:.40}")
        blocks, ratios = args.get("blocks"), args.get("keep_ratios")
        depth = len(plain.widths)
        whole = isinstance(blocks, list | tuple) and all(isinstance(b, int) and b is not True for b in blocks)
        if not whole or not all(a < b for a, b in itertools.pairwise([-1, *blocks, depth])):
            raise ArchError(f"blocks must be rising numbers from 0 to {depth - 1}, got {blocks!r:.60}")
        shares = isinstance(ratios, list | tuple) and all(isinstance(r, int | float) and 0 < r <= 1 for r in ratios)
        if not shares or len(ratios) != len(blocks) or list(ratios) != sorted(ratios, reverse=True):
            raise ArchError(
                f"keep_ratios must be shares in (0, 1], one for each of the {len(blocks)} blocks, none higher than the "
                f"one before; got {ratios!r:.60}"
            )
        for i in blocks:
            if plain.widths[i][0] == 0:
                raise ArchError(f"block {i} has no attention that would tell which patches to drop")
        return cls(plain.base, plain.widths, tuple(blocks), tuple(map(float, ratios)))

    def key(self) -> str:
        """See `Arch.key`."""
        kept = ",".join(f"{i}:{r:g}" for i, r in zip(self.blocks, self.keep_ratios, strict=True))
        return f"{super().key()}|{kept}"

    def canonical(self) -> ElasticArch:
        """See `Arch.canonical`; blocks that drop nothing are not listed, and a network without others is a
        `vit_elastic`."""
        before = (1.0, *self.keep_ratios)
        drops = [(i, r) for i, r, was in zip(self.blocks, self.keep_ratios, before, strict=False) if r < was]
        if not drops:
            return ElasticArch(self.base, self.widths)
        blocks, ratios = zip(*drops, strict=True)
        return TokenArch(self.base, self.widths, blocks, ratios)

    def layers(
        self, img_size: Any = 224, in_chans: int = 3, num_classes: int = 1000, **model_args
    ) -> tuple[Layer, ...]:
        """See `Arch.layers`; ``model_args`` are the base's own."""
        plain = super().layers(img_size, in_chans, num_classes, **model_args)
        if all(r == 1 for r in self.keep_ratios):
            return plain
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        known = {"img_size": size, "in_chans": in_chans, "num_classes": num_classes, **model_args}
        structure = structure_of(self.base, known)
        prefix, found, share = structure.prefix, [], 1.0
        kept = dict(zip(self.blocks, self.keep_ratios, strict=True))
        for part in structure.order():
            if isinstance(part, Layer):
                found.append(part)
                continue
            block, which = part
            branch, before = structure.pairs[block][which], share
            if which == 0:
                share = kept.get(block, share)
            found.append(_at(branch, self.widths[block][which], prefix, before, share))
        return tuple(layer for layer in found if layer is not None)


def _at(branch: BlockBranch, keep: int, prefix: int, before: float, after: float) -> Layer | None:
    """A branch for a share of the patches that enter its block, and one that leaves its attention."""
    patches = branch.tokens - prefix
    enter, leave = (patches if r == 1 else kept_of(patches, r) for r in (before, min(before, after)))
    if keep == 0 or leave == patches:
        return branch.layer(keep)
    enter, leave = enter + prefix, leave + prefix
    dim, runs = branch.dim, branch.runs
    if branch.kind == "mlp":
        macs = (branch.macs[0] + keep * branch.macs[1]) // branch.tokens * leave
        hidden = keep * branch.width
        memory = leave * max(3 * dim + 2 * runs * hidden, 4 * dim + hidden)
        shape = dict(tokens=leave, hidden=keep)
    else:
        inner = keep * branch.width
        products = 2 * branch.tokens**2 * branch.width
        linear = (branch.macs[1] - products) // branch.tokens - runs * branch.width * dim  # what queries alone need
        macs = branch.macs[0] // branch.tokens * leave + keep * linear * leave
        macs += inner * (runs * dim * enter + 2 * enter * leave)
        macs += inner * enter * (leave < enter)  # what the class token sees of each
        memory = enter * (3 * dim + runs * inner) + 2 * leave * inner
        shape = dict(tokens=enter, tokens_out=leave, num_heads=keep, head_dim=branch.width)
    params = branch.params[0] + keep * branch.params[1]
    return Layer.of(
        branch.kind, dim=dim, params_beside=branch.params[0], params_each=branch.params[1],
        macs=macs, params=params, memory=memory, **shape,
    )  # fmt: skip


class TokenSpace(ElasticSpace):
    """Networks of one base that differ in heads, hidden units and the patches that go on.

    Args:
        base: The timm model.
        choices: See `ElasticSpace`; blocks that drop patches keep a head.
        blocks: Numbers of the blocks that may drop patches. None: those at a quarter, half and three quarters.
        keep_ratios: What may be left of the first number of patches, from 1.0 down; after each of the blocks, at most
            what was left before.
        **model_args: See `ElasticSpace`.

    Raises:
        NarrowError, ValueError: See `ElasticSpace`.
        TokenError: The base cannot drop tokens, or blocks and ratios do not fit.
    """

    family = "elastic_tokens"
    arch_type = TokenArch
    supernet = "vit_tokens_supernet"

    def __init__(
        self,
        base: str = DEFAULT_BASE,
        choices: Sequence[Sequence[Sequence[int]]] | None = None,
        blocks: Sequence[int] | None = None,
        keep_ratios: Sequence[float] = KEEP_RATIOS,
        **model_args: Any,
    ) -> None:
        ratios = tuple(keep_ratios)
        falling = all(a > b for a, b in itertools.pairwise(ratios))
        if not ratios or ratios[0] != 1 or not falling or not all(0 < r <= 1 for r in ratios):
            raise TokenError(f"keep_ratios must fall from 1 and stay above 0, got {list(ratios)!r:.60}")
        plain = ElasticSpace(base, choices, **model_args)
        depth = len(plain.choices)
        self.blocks = tuple(sorted({depth * k // 4 for k in (1, 2, 3)}) if blocks is None else blocks)
        self.keep_ratios = tuple(map(float, ratios))
        with torch.device("meta"):  # what does not fit is said here
            model = create_base(base, None, **plain.model_args)
            _dropping(model, self)
            if model.attn_pool is not None:
                raise TokenError(f"attn_pool of {base} reads all tokens; its cost for fewer is not known")
        for i in self.blocks:
            if not any(plain.choices[i][0]):
                raise TokenError(f"block {i} has no attention that tells which patches to drop; give other blocks")
        trimmed = [
            (tuple(n for n in heads if n or i not in self.blocks), hidden)
            for i, (heads, hidden) in enumerate(plain.choices)
        ]
        super().__init__(base, trimmed, **model_args)

    def _genes(self) -> Iterator[Gene]:
        yield from super()._genes()
        for i in self.blocks:
            yield Gene("keep_ratio", self.keep_ratios, stage=i)

    def _place(self, block: int, which: int) -> Position:
        """See `ElasticSpace`: it depends on what was left before, and on what its own block leaves."""
        branch, prefix = self.structure.pairs[block][which], self.structure.prefix
        drops = which == 0 and block in self.blocks
        after = sum(i <= block for i in self.blocks)  # places passed once the block is done
        columns = [2 * len(self.choices) + k for k in (after - 2, after - 1)[not drops :] if k >= 0]

        def layer(keep: int, *shares: float) -> Layer | None:
            shares = (1.0, *shares) if len(shares) < 1 + drops else shares
            return _at(branch, keep, prefix, shares[0], shares[-1])

        return Position((2 * block + which, *columns), layer)

    def cascade(self, rows: np.ndarray) -> np.ndarray:
        """See `SearchSpace.cascade`; what is dropped does not come back."""
        rows = super().cascade(rows)
        kept = rows[:, 2 * len(self.choices) :]
        np.maximum.accumulate(kept, axis=1, out=kept)
        return rows

    def size(self) -> int:
        """See `SearchSpace.size`."""
        choices, places = len(self.keep_ratios), len(self.blocks)
        return super().size() // choices**places * math.comb(choices + places - 1, places)

    def choices_dict(self) -> dict[str, Any]:
        """See `SearchSpace.choices_dict`."""
        return {**super().choices_dict(), "blocks": self.blocks, "keep_ratios": self.keep_ratios}

    @classmethod
    def from_choices(cls, data: Mapping[str, Any], model_args: Mapping[str, Any]) -> TokenSpace:
        """See `SearchSpace.from_choices`."""
        tokens = {k: data[k] for k in ("blocks", "keep_ratios") if k in data}
        for name, kind in (("blocks", int), ("keep_ratios", int | float)):
            values = tokens.get(name, [])
            if not isinstance(values, list | tuple) or not all(isinstance(v, kind) and v is not True for v in values):
                raise ValueError(f"{name} of a space with tokens must be a list of numbers, got {values!r:.60}")
        plain = ElasticSpace.from_choices({k: v for k, v in data.items() if k not in tokens}, model_args)
        return cls(plain.base, plain.choices, **tokens, **model_args)

    def of_widths(self, widths: Widths) -> TokenArch:
        """See `ElasticSpace.of_widths`."""
        return TokenArch(self.base, widths, self.blocks, (1.0,) * len(self.blocks))

    def decode(self, rows: np.ndarray) -> list[TokenArch]:
        """See `SearchSpace.decode`."""
        kept = rows[:, 2 * len(self.choices) :].tolist()
        return [
            TokenArch(self.base, widths, self.blocks, tuple(self.keep_ratios[i] for i in row))
            for widths, row in zip(self.widths_of(rows), kept, strict=True)
        ]

    def encode(self, arch: Arch) -> np.ndarray:
        """See `SearchSpace.encode`."""
        if not isinstance(arch, TokenArch):
            raise ValueError(f"networks of the space drop patches, they are {TokenArch.__name__}; got {arch!r:.80}")
        if arch.blocks != self.blocks:
            raise ValueError(f"patches are dropped in blocks {list(self.blocks)}, the network does in {arch.blocks}")
        if unknown := [r for r in arch.keep_ratios if r not in self.keep_ratios]:
            raise ValueError(f"keep_ratio {unknown[0]} is not one of {', '.join(map(str, self.keep_ratios))}")
        kept = [self.keep_ratios.index(r) for r in arch.keep_ratios]
        return np.concatenate([super().encode(arch), np.array(kept, np.int8)])


class TokenSupernet(ElasticSupernet):
    """An elastic vision transformer, and its forms that drop patches, see `with_tokens`."""

    space: TokenSpace

    def check_fit(self, arch: Any) -> None:
        """See `Supernet.check_fit`; any shares fit."""
        super().check_fit(arch)
        if arch.blocks != self.space.blocks:
            raise ArchError(
                f"patches are dropped in blocks {list(self.space.blocks)} of the supernet, not in {list(arch.blocks)}"
            )

    def forward_groups(self, h: torch.Tensor, archs: Sequence[Any], mode: str) -> Any:
        """See `Supernet.forward_groups`; groups of equal numbers of tokens are computed at once."""
        each, start, outs = h.shape[0] // len(archs), 0, []
        try:
            for ratios, run in itertools.groupby(archs, lambda arch: arch.keep_ratios):
                alike = list(run)
                stop = start + each * len(alike)
                self.keep_ratios = list(ratios)
                outs.append(super().forward_groups(h[start:stop], alike, mode))
                start = stop
        finally:
            self.keep_ratios = [1.0] * len(self.space.blocks)
        if len(outs) == 1:
            return outs[0]
        if isinstance(outs[0], tuple):  # of a distilled network in training
            return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))
        return torch.cat(outs)

    def attend(self, block: nn.Module, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        """See `AdaptiveTokenSampling.attend`: by the heads that are in force for each group."""
        layer, parts = block.attn, []
        if layer.repairing is not None:
            (keep,) = layer.in_force
            fixed = layer.repair(block.norm1(x), keep)
            for part in x.split(REPAIR_ROWS):
                with layer.narrowed(keep, fixed):
                    parts.append(super().attend(block, part, *args))
        else:
            for part, keep in zip(x.chunk(len(layer.in_force)), layer.in_force, strict=True):
                with layer.narrowed(keep):
                    parts.append(super().attend(block, part, *args))
        tokens, index, _ = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(index), None

    def stand_alone(self, arch: TokenArch) -> tuple[Arch, dict[str, Any]]:
        """See `Supernet.stand_alone`."""
        return super().stand_alone(arch.canonical())


def with_tokens(
    net: ElasticSupernet, keep_ratios: Sequence[float] = KEEP_RATIOS, blocks: Sequence[int] | None = None
) -> TokenSupernet:
    """An elastic supernet, before it is calibrated, whose networks also drop patches; it has the same weights.

    >>> net = with_tokens(timm_resnas.elastic(timm.create_model("vit_small_patch16_224", pretrained=True)))

    Args:
        net: Of a timm VisionTransformer with a class token.
        keep_ratios: See `TokenSpace`.
        blocks: See `TokenSpace`.

    Raises:
        TokenError: See `TokenSpace`.
    """
    plain = net.space
    return supernet_over(TokenSpace(plain.base, plain.choices, blocks, keep_ratios, **plain.model_args), net)


default_cfgs = generate_default_cfgs({TokenSpace.supernet: default_cfg(TokenSpace.supernet)})


def _dropping(model: nn.Module, space: TokenSpace) -> nn.Module:
    return reduce_in_place(model, METHOD, blocks=space.blocks, keep_ratios=[1.0] * len(space.blocks))


@register_model
def vit_tokens_supernet(pretrained: bool = False, space: Mapping[str, Any] | None = None, **kwargs) -> TokenSupernet:
    """Supernet of narrower forms of a timm vision transformer that drop patches; ``space`` as `TokenSpace.to_dict`."""
    return build_supernet(TokenSpace, TokenSupernet, _dropping, pretrained, space, **kwargs)
