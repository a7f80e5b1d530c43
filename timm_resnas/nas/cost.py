"""Cost of a ViT-ResNAS architecture from the architecture alone, and budgets on it.

Multiply-accumulates (MACs), parameters and peak activation memory are exact integers; no model is built. MACs are what
"Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642) counts: convolutions, linear layers and the
two products of attention. Biases, norms, softmax, activations, sums and position embeddings are left out, and so is the
patch head, which runs in training only.

The released estimator fixes the map of the convolutional stem at 112 x 112, which is too low away from 224 px. Here it
is half the image, so that the count equals half of torch's ``FlopCounterMode`` at any size; at 224 px both are equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from ..arch import Arch, ArchError, Block, Head, PatchEmbed, Reduction

__all__ = ["Budget", "CostModel", "cost_model", "macs", "params", "peak_memory"]

_BYTES = 4  # float32


def macs(
    arch: Arch,
    *,
    img_size: int | Iterable[int] = 224,
    patch_size: int = 14,
    in_chans: int = 3,
    num_classes: int | None = None,
    distill_token: bool = False,
) -> int:
    """Multiply-accumulates of one inference forward of one image.

    Args:
        arch: The architecture; absent blocks cost nothing.
        img_size: Side of the square image, or (height, width), in pixels.
        patch_size: Side of a patch of the first stage, in pixels.
        in_chans: Channels of the image.
        num_classes: Size of the classifier; None takes the head's number, 0 is no classifier.
        distill_token: Count the distillation token and its classifier too.

    Raises:
        ArchError: The total stride does not divide ``img_size``, or another argument is out of range.
    """
    model = cost_model(
        arch,
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        distill_token=distill_token,
    )
    dims, attn, mlp, _ = _stage_sums(arch)
    return model.macs(dims, attn, mlp)


def params(
    arch: Arch,
    *,
    img_size: int | Iterable[int] = 224,
    patch_size: int = 14,
    in_chans: int = 3,
    num_classes: int | None = None,
    distill_token: bool = False,
    patch_head: bool = False,
) -> int:
    """Parameters of the model, position embeddings included, batch norm's running statistics not.

    Args:
        arch: See :func:`macs`; so are the other arguments.
        patch_head: Count the classifier on patch tokens (token labelling) too.

    Raises:
        ArchError: See :func:`macs`.
    """
    model = cost_model(
        arch,
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        distill_token=distill_token,
    )
    return model.params(*_stage_sums(arch), patch_head=patch_head)


def peak_memory(
    arch: Arch,
    *,
    img_size: int | Iterable[int] = 224,
    patch_size: int = 14,
    in_chans: int = 3,
    num_classes: int | None = None,
    distill_token: bool = False,
) -> int:
    """Peak activation memory of one inference forward of one image in float32, in bytes.

    The largest sum, over the forward, of the sizes of the tensors that PyTorch holds at that moment when it runs our
    model eagerly without gradients: the image, the operation's inputs and output, and what a variable or a caller
    still names (a block's input until its end; its normalised input, and query, key and value, until attention has
    ended). Views are free, attention is fused (no score matrix), dropout does nothing. Weights, and the working space
    that a kernel takes for itself, are not counted. So it follows from shapes alone.

    Args:
        arch: See :func:`macs`; so are the other arguments.

    Raises:
        ArchError: See :func:`macs`.
    """
    model = cost_model(
        arch,
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        distill_token=distill_token,
    )
    return model.memory(arch)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of every architecture that shares its stem, number of stages, input and heads.

    The methods take one value per stage: embed width, and the sums over the stage's present blocks of attention
    channels and hidden units, and the number of present blocks. A value is an integer, or an array of them to cost
    many architectures at once.

    Attributes:
        stem: Type and mid channels of the patch embedding.
        image: Channels, height and width of the input.
        patch_size: Side of a patch, in pixels.
        positions: Patch positions of each stage.
        prefix: Number of prefix tokens (class, distillation), each of which has a classifier.
        num_classes: Size of a classifier.
    """

    stem: tuple[int, int]
    image: tuple[int, int, int]
    patch_size: int
    positions: tuple[int, ...]
    prefix: int
    num_classes: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each stage, prefix tokens included."""
        return tuple(p + self.prefix for p in self.positions)

    @property
    def _stem_map(self) -> int:
        """Positions of the maps inside the convolutional stem."""
        return (self.image[1] // 2) * (self.image[2] // 2)

    def macs(self, dims: Sequence, attn: Sequence, mlp: Sequence) -> Any:
        """Multiply-accumulates (paper, section 4; formula of the released code with the stem's map mended)."""
        kind, mid = self.stem
        chans = self.image[0]
        if kind:
            total = (chans * mid * 9 + 2 * mid * mid * 9) * self._stem_map
            total = total + dims[0] * (mid * (self.patch_size // 2) ** 2 * self.positions[0])
        else:
            total = dims[0] * (chans * self.patch_size**2 * self.positions[0])
        for s in range(len(self.positions)):
            total = total + attn[s] * self.attn_macs(s, dims[s]) + mlp[s] * self.mlp_macs(s, dims[s])
            if s:
                total = total + dims[s - 1] * dims[s] * (9 * self.positions[s] + self.prefix)
        return total + dims[-1] * (self.num_classes * self.prefix)

    def attn_macs(self, stage: int, dim: Any) -> Any:
        """Multiply-accumulates of one attention channel: query, key, value, output, and its part of both products."""
        n = self.positions[stage] + self.prefix
        return (4 * dim + 2 * n) * n

    def mlp_macs(self, stage: int, dim: Any) -> Any:
        """Multiply-accumulates of one hidden unit."""
        return 2 * dim * (self.positions[stage] + self.prefix)

    def params(self, dims: Sequence, attn: Sequence, mlp: Sequence, depths: Sequence, *, patch_head: bool = False):
        """Number of parameters."""
        kind, mid = self.stem
        chans = self.image[0]
        if kind:
            # three convolutions without bias, each with a batch norm, then the patch projection
            total = chans * mid * 9 + 2 * mid * mid * 9 + 3 * 2 * mid
            total = total + dims[0] * (mid * (self.patch_size // 2) ** 2 + 1)
        else:
            total = dims[0] * (chans * self.patch_size**2 + 1)
        total = total + dims[0] * (self.prefix + self.prefix + self.positions[0])  # tokens, position embedding
        for s in range(len(self.positions)):
            total = total + attn[s] * self.attn_params(s, dims[s]) + mlp[s] * self.mlp_params(s, dims[s])
            total = total + depths[s] * (6 * dims[s])  # two layer norms, biases of the two outputs
            if s:
                # layer norm, convolution, token projection, position embedding
                total = total + dims[s - 1] * dims[s] * 10 + 2 * dims[s - 1] + dims[s] * (2 + self.positions[s])
        heads = self.prefix + bool(patch_head)
        classifiers = (dims[-1] + 1) * (self.num_classes * heads)
        return total + 2 * dims[-1] + classifiers

    def attn_params(self, stage: int, dim: Any) -> Any:
        """Parameters of one attention channel."""
        return 4 * dim + 3

    def mlp_params(self, stage: int, dim: Any) -> Any:
        """Parameters of one hidden unit."""
        return 2 * dim + 1

    def memory(self, arch: Arch) -> int:
        """Peak activation memory of one architecture in bytes, see :func:`peak_memory`."""
        stage, peaks = 0, []
        for block in arch.blocks:
            if type(block) is not Block:
                stage += 1
            elif block.exists:
                peaks += self.block_memory(stage, block.dim, block.num_heads * block.head_dim, block.mlp_hidden)
        return _BYTES * max(*peaks, *self.fixed_memory(arch.embed_dims))

    def costs(self, arch: Arch) -> dict[str, int]:
        """``macs``, ``params`` (without a patch head) and ``memory`` of one architecture."""
        dims, attn, mlp, depths = _stage_sums(arch)
        return {
            "macs": self.macs(dims, attn, mlp),
            "params": self.params(dims, attn, mlp, depths),
            "memory": self.memory(arch),
        }

    def block_memory(self, stage: int, dim: Any, attn: Any, hidden: Any) -> tuple:
        """Values held inside a block at its candidate peaks; the largest counts. See :func:`peak_memory`."""
        n = self.positions[stage] + self.prefix
        image = math.prod(self.image)
        return (
            image + n * (3 * dim + 4 * attn),  # output of attention: input, norm; query, key, value, heads
            image + n * (3 * dim + 2 * hidden),  # GELU: input, sum, norm; hidden before and after
            image + n * (4 * dim + hidden),  # output of the MLP: input, sum, norm; hidden after
        )

    def fixed_memory(self, dims: Sequence) -> tuple:
        """Values held outside the blocks at their candidate peaks. See :func:`peak_memory`."""
        kind, mid = self.stem
        image = math.prod(self.image)
        patches, tokens = dims[0] * self.positions[0], dims[0] * self.tokens[0]
        peaks = [image + patches + 2 * tokens]  # adding the position embedding
        if kind:
            inner = mid * self._stem_map
            peaks += [image + 4 * inner, image + inner + patches]
        for s in range(1, len(self.positions)):
            before, after = dims[s - 1] * self.tokens[s - 1], dims[s] * self.tokens[s]
            prefix, patches = dims[s] * self.prefix, dims[s] * self.positions[s]
            pooled, shortcut = dims[s - 1] * self.positions[s], dims[s - 1] * self.tokens[s]
            # joining prefix tokens and patches: input, norm, both, their parts before the position embedding
            peaks.append(image + 2 * before + prefix + 2 * patches + after)
            # adding the residual: input, both parts, pooled and padded residual, both terms and the sum
            peaks.append(image + before + prefix + patches + pooled + shortcut + 3 * after)
        # classifiers; a distilled net also makes their sum and mean
        logits = self.num_classes * (1 if self.prefix == 1 else 4)
        peaks.append(image + dims[-1] * self.tokens[-1] + logits)
        return tuple(peaks)


def cost_model(
    arch: Arch,
    *,
    img_size: int | Iterable[int] = 224,
    patch_size: int = 14,
    in_chans: int = 3,
    num_classes: int | None = None,
    distill_token: bool = False,
) -> CostModel:
    """The :class:`CostModel` of an architecture and of all that differ from it in widths, heads and depth only.

    Raises:
        ArchError: See :func:`macs`.
    """
    size = img_size if isinstance(img_size, int) else tuple(img_size)
    stem = (arch.patch_embed.kind, arch.patch_embed.mid_dim)
    classes = arch.head.num_classes if num_classes is None else num_classes
    return _cost_model(stem, arch.num_reductions, size, patch_size, in_chans, classes, bool(distill_token))


@lru_cache(maxsize=1024)
def _cost_model(stem, num_reductions, img_size, patch_size, in_chans, num_classes, distill_token) -> CostModel:
    for name, value, low in (("patch_size", patch_size, 1), ("in_chans", in_chans, 1), ("num_classes", num_classes, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ArchError(f"{name} must be an integer of at least {low}, got {value!r}")
    image = (img_size, img_size) if isinstance(img_size, int) else img_size
    if len(image) != 2 or not all(isinstance(side, int) for side in image):
        raise ArchError(f"img_size must be an integer or (height, width), got {img_size!r}")
    grids = _grids(stem[0], num_reductions, image, patch_size)
    positions = tuple(h * w for h, w in grids)
    return CostModel(stem, (in_chans, *image), patch_size, positions, 1 + distill_token, num_classes)


def _grids(kind: int, num_reductions: int, image: tuple[int, int], patch_size: int) -> tuple[tuple[int, int], ...]:
    # only the stem's type and the number of reductions matter, so that the answer serves a whole space
    bare = Arch(PatchEmbed(kind, 1, 1), (Reduction(1, 1),) * num_reductions, Head(1, 0))
    return bare.grids(image, patch_size)


def _stage_sums(arch: Arch) -> tuple[list[int], list[int], list[int], list[int]]:
    """Per stage: embed width, and over its present blocks attention channels, hidden units, and their number."""
    dims, attn, mlp, depths = [arch.patch_embed.dim], [0], [0], [0]
    for block in arch.blocks:
        if type(block) is not Block:
            dims.append(block.out_dim)
            attn.append(0)
            mlp.append(0)
            depths.append(0)
        elif block.exists:
            attn[-1] += block.num_heads * block.head_dim
            mlp[-1] += block.mlp_hidden
            depths[-1] += 1
    return dims, attn, mlp, depths


# -- budgets ----------------------------------------------------------------------------------------------------------

_NAMES = ("macs", "params", "latency_ms", "memory")
_KINDS = {"macs": "count", "params": "count", "latency_ms": "time", "memory": "bytes"}
_UNITS = {
    "count": {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12},
    "time": {"": 1, "ms": 1, "us": Decimal("0.001"), "s": 1000},
    "bytes": {"": 1, "b": 1}
    | {p + e: 10**n for p, n in (("k", 3), ("m", 6), ("g", 9)) for e in ("", "b")}
    | {p + "ib": 2**n for p, n in (("k", 10), ("m", 20), ("g", 30))},
}


class Budget:
    """Upper limits on an architecture's cost; the first-named also has a lower band.

    ``Budget(macs=1.8e9, latency_ms=12)`` allows at most 1.8 GMACs and 12 ms, and at least ``lower`` times 1.8 GMACs:
    the paper searches in the band from 0.975 of the limit to the limit. ``lower=0`` is no lower end.

    Args:
        lower: Lower end of the band, as a fraction of the first-named limit.
        **limits: ``macs``, ``params``, ``latency_ms`` (milliseconds), ``memory`` (bytes), in order of importance.

    Raises:
        ValueError: No limit, an unknown one, or a number out of range.
    """

    __slots__ = ("limits", "lower")

    limits: dict[str, int | float]
    lower: float

    def __init__(self, *, lower: float = 0.975, **limits: int | float) -> None:
        if not limits:
            raise ValueError(f"a budget needs at least one limit; known: {', '.join(_NAMES)}")
        clean: dict[str, int | float] = {}
        for name, value in limits.items():
            if name not in _NAMES:
                raise ValueError(f"unknown budget limit {name!r}; known: {', '.join(_NAMES)}")
            clean[name] = _number(name, value)
            if clean[name] <= 0:
                raise ValueError(f"budget limit {name} must be above 0, got {value!r}")
        lower = _number("lower", lower)
        if not 0 <= lower < 1:
            raise ValueError(f"the budget's lower must be at least 0 and below 1 (of the limit), got {lower!r}")
        object.__setattr__(self, "limits", clean)
        object.__setattr__(self, "lower", lower)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Budget does not change; make a new one instead of setting {name}")

    def __reduce__(self) -> tuple:
        return Budget.from_dict, (self.to_dict(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and list(self) == list(other) and self.lower == other.lower

    def __hash__(self) -> int:
        return hash((tuple(self), self.lower))

    def __iter__(self) -> Iterator[tuple[str, int | float]]:
        return iter(self.limits.items())

    @classmethod
    def parse(cls, text: str, share_of: Mapping[str, int | float] | None = None) -> Budget:
        """Read ``"macs=1.8G,latency=12ms"``.

        Counts take K, M, G, T; ``latency`` takes us, ms, s (bare: ms); ``memory`` takes KB, MB, GB (powers of 1000) and
        KiB, MiB, GiB; ``lower=0.95`` sets the band. ``macs=40%`` is a share of ``share_of["macs"]``, such as the
        largest network's.

        Raises:
            ValueError: The part of the text that cannot be read, and what was expected there.
        """
        limits: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (x.strip() for x in part.partition("="))
            name = {"latency": "latency_ms"}.get(name.lower(), name.lower())
            if not equals or name not in (*_NAMES, "lower"):
                raise ValueError(
                    f"budget {text!r}: cannot read {part.strip()!r}; expected name=value with a name of macs, params, "
                    f"latency, memory or lower, as in 'macs=1.8G,latency=12ms'"
                )
            if name in limits:
                raise ValueError(f"budget {text!r}: {name} is given twice")
            units = dict(_UNITS[_KINDS[name]]) if name != "lower" else {"": 1}
            if share_of is not None and name in share_of:
                units["%"] = Decimal(share_of[name]) / 100
            match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]{1,3})?)\s*([a-z]*|%)", value.lower())
            try:
                number = Decimal(match[1]) * units[match[2]]
            except (TypeError, KeyError, InvalidOperation):
                known = ", ".join(u for u in units if u) or "none"
                raise ValueError(f"budget {text!r}: cannot read {value!r}; expected a number, units: {known}") from None
            limits[name] = float(number) if name in ("latency_ms", "lower") else int(number)
        return cls(**limits)

    @property
    def first(self) -> str:
        """Name of the limit that carries the lower band."""
        return next(iter(self.limits))

    @property
    def band(self) -> tuple[float, int | float]:
        """Lower and upper end for the first-named cost."""
        limit = self.limits[self.first]
        return self.lower * limit, limit

    def check(self, costs: Mapping[str, int | float]) -> list[str]:
        """Names of the limits that these costs miss; empty when within budget.

        Raises:
            ValueError: A limited cost is not in ``costs``.
        """
        failed = []
        for i, (name, limit) in enumerate(self.limits.items()):
            if name not in costs:
                raise ValueError(f"the budget limits {name}, but only these costs are known: {', '.join(costs)}")
            cost = costs[name]
            # written so that NaN fails
            if not (cost <= limit and (i > 0 or cost >= self.lower * limit)):
                failed.append(name)
        return failed

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form: the limits in order, and ``lower``."""
        return {**self.limits, "lower": self.lower}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: Not a mapping of known limits to numbers.
        """
        if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
            raise ValueError(f"a budget must be a mapping of limits to numbers, got {data!r:.80}")
        return cls(**data)

    def __str__(self) -> str:
        parts = []
        for i, (name, limit) in enumerate(self.limits.items()):
            low = f"{format_cost(name, self.lower * limit)} to " if i == 0 and self.lower else "at most "
            parts.append(f"{name.removesuffix('_ms')} {low}{format_cost(name, limit)}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"


def format_cost(name: str, value: float) -> str:
    """A cost as a person reads it: ``1.782G``, ``12 ms``, ``3.61 MB``."""
    if name == "latency_ms":
        return f"{value:.4g} ms"
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.5g}" + (f" {unit}B" if name == "memory" else unit)
    return f"{value:.5g}" + (" B" if name == "memory" else "")


def _number(name: str, value: Any) -> int | float:
    """A finite Python number; counts become integers."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"budget: {name} must be a finite number, got {value!r:.40}")
    return value if name in ("latency_ms", "lower") else int(value)
