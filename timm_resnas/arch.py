"""What a network is (`Arch`), what its parts cost (`Layer`) and consist of (`Units`): plain values, no model built.

A family of searchable networks subclasses `Arch`. Code outside the family's files uses what stands here and nothing
else. This module imports nothing of ours.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

__all__ = ["Arch", "ArchError", "Layer", "Part", "Units", "attention", "image_size", "mlp", "total_costs"]

BYTES = 4  # float32


class ArchError(ValueError):
    """An architecture description is malformed; the message names the part and what was expected."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A part of a network whose cost depends on nothing else of it.

    Layers of one kind and shape are equal, whatever the family and wherever they stand.

    Attributes:
        kind: ``"stem"``, ``"attention"``, ``"mlp"``, ``"reduction"``, ``"conv"``, ``"head"``, ...
        shape: All that decides its cost, as (name, integer) pairs sorted by name.
        macs: Multiply-accumulates for one image: convolutions, linear layers and both products of attention. Biases,
            norms, softmax, activations, sums and position embeddings are left out.
        params: Parameters.
        memory: Bytes of activations at its peak in float32, for one image, without the image that the caller holds.
            What PyTorch holds at that moment in an eager forward without gradients: an operation's inputs and output,
            and what a variable or a caller still names. Views are free, attention is fused, weights are not counted.
    """

    kind: str
    shape: tuple[tuple[str, int], ...]
    macs: int = field(default=0, compare=False)
    params: int = field(default=0, compare=False)
    memory: int = field(default=0, compare=False)

    @classmethod
    def of(cls, kind: str, *, macs: int = 0, params: int = 0, memory: int = 0, **shape: int) -> Layer:
        """A layer from its shape as keywords; ``memory`` counts values of 4 bytes."""
        return cls(kind, tuple(sorted(shape.items())), macs, params, BYTES * memory)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in self.shape)})"


class Part(NamedTuple):
    """Where units' numbers lie in a parameter.

    Attributes:
        param: Name of the parameter.
        dim: Its dimension that runs over the units; it holds ``runs`` stretches of ``count * width`` entries.
        runs: Stretches: 3 where query, key and value share a weight.
        width: Entries of one unit in a stretch: the head's dimension.
    """

    param: str
    dim: int
    runs: int = 1
    width: int = 1


class Units(NamedTuple):
    """Interchangeable units of one layer and every slice that is theirs.

    Attributes:
        name: The layer, such as ``"blocks.3.attn"``.
        count: Number of units.
        parts: Their slices. The last one reads them: zero there silences a unit.
    """

    name: str
    count: int  # type: ignore[assignment]  # in front of tuple's method
    parts: tuple[Part, ...]


@lru_cache(maxsize=1 << 16)
def attention(tokens: int, dim: int, num_heads: int, head_dim: int) -> Layer:
    """The attention half of a pre-norm transformer block, with qkv biases, its norm and its sum."""
    inner = num_heads * head_dim
    return Layer.of(
        "attention",
        tokens=tokens,
        dim=dim,
        num_heads=num_heads,
        head_dim=head_dim,
        macs=inner * (4 * dim + 2 * tokens) * tokens,
        params=inner * (4 * dim + 3) + 3 * dim,
        # output of attention: input, norm; query, key, value, heads
        memory=tokens * (3 * dim + 4 * inner),
    )


@lru_cache(maxsize=1 << 16)
def mlp(tokens: int, dim: int, hidden: int) -> Layer:
    """The MLP half of a pre-norm transformer block, with its norm and its sum."""
    return Layer.of(
        "mlp",
        tokens=tokens,
        dim=dim,
        hidden=hidden,
        macs=2 * dim * hidden * tokens,
        params=hidden * (2 * dim + 1) + 3 * dim,
        # activation: input, sum, norm; hidden before and after. Output: input, sum, norm, output; hidden after
        memory=tokens * max(3 * dim + 2 * hidden, 4 * dim + hidden),
    )


def total_costs(layers: Iterable[Layer], image_values: int = 0) -> dict[str, int]:
    """``macs`` and ``params`` (sums) and ``memory`` (bytes: the image, and the largest peak) of a network's layers.

    Args:
        layers: Its layers.
        image_values: Channels x height x width of the input.
    """
    layers = tuple(layers)
    return {
        "macs": sum(layer.macs for layer in layers),
        "params": sum(layer.params for layer in layers),
        "memory": BYTES * image_values + max((layer.memory for layer in layers), default=0),
    }


def image_size(img_size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or as a pair.

    Raises:
        ArchError: It is neither.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size) if _is_pair(img_size) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ArchError(f"img_size must be a positive integer or (height, width), got {img_size!r:.60}")
    return sides


def _is_pair(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


class Arch(ABC):
    """A network as data: a registered entry point and the arguments that decide its architecture.

    Families subclass it with a frozen dataclass; the subclass is found by its ``model``.

    Attributes:
        model: Name of the entry point that builds it, such as ``"vit_resnas"``.
    """

    __slots__ = ()

    model: ClassVar[str]
    _types: ClassVar[dict[str, type[Arch]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model" in cls.__dict__:
            Arch._types[cls.model] = cls

    # -- a family supplies -------------------------------------------------------------------------------------------

    @abstractmethod
    def args(self) -> dict[str, Any]:
        """The entry point's arguments that decide the architecture, JSON-plain."""

    @classmethod
    @abstractmethod
    def from_args(cls, args: Mapping[str, Any]) -> Self:
        """Inverse of `args`; other keys are left alone. The arguments are checked, for they may come from the net.

        Raises:
            ArchError: Naming the part that is malformed and what was expected there.
        """

    @classmethod
    def describes(cls, args: Mapping[str, Any]) -> bool:
        """Whether a model of the entry point with these arguments is one of the family's networks."""
        return True

    @abstractmethod
    def layers(self, **model_args: Any) -> tuple[Layer, ...]:
        """What the network consists of, in the order of its forward; absent parts are absent.

        Args:
            **model_args: ``img_size``, ``in_chans``, ``num_classes`` and the family's own, with the entry point's
                defaults; arguments that decide no cost are ignored.

        Raises:
            ArchError: The architecture cannot be built with these arguments.
        """

    def key(self) -> str:
        """Identity as a sub-network of a supernet: equal where the same weights are selected. Sortable."""
        return json.dumps(self.args(), sort_keys=True, separators=(",", ":"))

    def canonical(self) -> Arch:
        """The stand-alone network, absent parts deleted where the family can; the form that is published."""
        return self

    # -- written once ------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, value: Any) -> Self:
        """An architecture from any of its forms: an instance (returned as it is), its `record`, or its `args`.

        Raises:
            ArchError: It is of another family, or malformed.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            if value.get("model", cls.model) != cls.model:
                raise ArchError(f"the architecture is a {value['model']!r:.60}, expected a {cls.model!r}")
            return cls.from_args(value.get("args", value))
        raise ArchError(f"expected an architecture of {cls.model!r} or its arguments, got {type(value).__name__}")

    def record(self) -> dict[str, Any]:
        """``{"model": ..., "args": ...}``, JSON-plain: the form that histories and results hold."""
        return {"model": self.model, "args": self.args()}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Arch:
        """Inverse of `record`; other keys are left alone.

        Raises:
            ArchError: It is not a record of a searchable family's network.
        """
        name = record.get("model") if isinstance(record, Mapping) else None
        if not isinstance(name, str) or name not in Arch._types or not isinstance(record.get("args"), Mapping):
            known = ", ".join(sorted(Arch._types))
            raise ArchError(f"an architecture's record has a model ({known}) and its args, got {record!r:.120}")
        return Arch._types[name].from_args(record["args"])

    @staticmethod
    def of(model: str, args: Mapping[str, Any]) -> Arch | None:
        """The architecture of a timm model from its name and arguments; None for other than searchable families'.

        Raises:
            ArchError: The arguments are malformed.
        """
        kind = Arch._types.get(model)
        return kind.from_args(args) if kind is not None and kind.describes(args) else None

    def create(self, pretrained: bool = False, **model_args: Any) -> nn.Module:
        """The network: ``timm.create_model(self.model, **self.args(), **model_args)``."""
        import timm

        return timm.create_model(self.model, pretrained=pretrained, **self.args(), **model_args)

    def costs(self, *, img_size: int | Iterable[int] = 224, in_chans: int = 3, **model_args: Any) -> dict[str, int]:
        """``macs``, ``params`` and ``memory`` of the network for images of this size, see `Layer`.

        Args:
            img_size: Side of a square image, or (height, width), in pixels.
            in_chans: Channels of the image.
            **model_args: See `layers`.

        Raises:
            ArchError: See `layers`.
        """
        height, width = image_size(img_size)
        layers = self.layers(img_size=(height, width), in_chans=in_chans, **model_args)
        return total_costs(layers, in_chans * height * width)
