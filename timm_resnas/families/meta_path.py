"""EfficientFormer's supernet as its paper trains it: every block a mixture of its paths, which train with its weights.

Paper: "EfficientFormer: Vision Transformers at MobileNet Speed" - https://arxiv.org/abs/2206.01191. The authors did not
release it. Their formula has uniform noise where the Gumbel-softmax has Gumbel noise; both are here, and the default is
what is printed. No schedule of the temperature is printed.

>>> net = timm.create_model("efficientformer_supernet")
>>> mixed = MetaPath(net)  # trains like any classifier: mixed(images) -> logits
>>> mixed.importance()  # what may go first
>>> net.extract(mixed.arch())
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nas.batch_norm import checkpointed
from ..nas.supernet import checkpoints
from .efficientformer_nas import LAST, EfficientFormerSupernet
from .efficientformer_space import EfficientFormerArch

__all__ = ["MetaPath"]

NOISES = ("uniform", "gumbel", "none")


class MetaPath(nn.Module):
    """A supernet whose blocks are mixtures, at its largest widths: ``x' = sum_n w_n path_n(x)``.

    The paths of a place are its block that attends, where it has one, its block that pools, and the identity, where the
    space lets it be absent. ``w = softmax((alpha + noise) / temperature)``; in evaluation there is no noise. A map is
    laid out as tokens for a block that attends, and back.

    Args:
        net: The supernet; its own weights are trained.
        noise: ``"uniform"``: from U(0, 1), as printed; ``"gumbel"``: ``-log(-log U)``; ``"none"``. Drawn for each place
            in each forward in training, from torch's generator.
        temperature: Of the softmax; may be set at any time.

    Attributes:
        alphas: For each place with several paths, in the order of the forward, their parameters, zero at first.

    Raises:
        ValueError: The net is no EfficientFormer supernet, the noise is unknown, or the temperature is not positive.
    """

    def __init__(self, net: nn.Module, noise: str = "uniform", temperature: float = 1.0) -> None:
        super().__init__()
        if not isinstance(net, EfficientFormerSupernet):
            raise ValueError(f"paths are mixed in an EfficientFormerSupernet, got a {type(net).__name__}")
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}; got {noise!r:.40}")
        if not temperature > 0:
            raise ValueError(f"the temperature must be above 0, got {temperature}")
        self.net, self.noise, self.temperature = net, noise, temperature
        like = net.head.weight if isinstance(net.head, nn.Linear) else next(net.parameters())
        counts = [len(self.paths(i, p)) for i, p in self._places()]
        self.alphas = nn.ParameterList(like.new_zeros(n).requires_grad_() for n in counts if n > 1)

    def paths(self, stage: int, place: int) -> tuple[str, ...]:
        """Names of a place's paths: of ``"attends"``, ``"pools"``, ``"identity"`` those that it has."""
        space = self.net.space
        attends = stage == LAST and place >= space.depths[LAST] - space.most_vit[LAST]
        absent = space.places[stage][place][0] is not None
        return ("attends",) * attends + ("pools",) + ("identity",) * absent

    def forward(self, x: torch.Tensor) -> Any:
        """What the network's `forward` returns. [B, C, H, W] -> [B, K]"""
        net, alphas, again = self.net, iter(self.alphas), checkpoints(self.net)
        x = net.stem(x)
        for i, stage in enumerate(net.stages):
            x = stage.downsample(x)
            for p in range(net.space.depths[i]):
                paths = self.paths(i, p)
                outputs = [self._path(i, p, name, x, again) for name in paths]
                if len(paths) > 1:
                    weights = self._weights(next(alphas))
                    outputs = [w * out for w, out in zip(weights, outputs, strict=True)]
                x = torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]
        return net.forward_head(net.norm(x.flatten(2).transpose(1, 2)))

    def probabilities(self) -> list[list[dict[str, float]]]:
        """Softmax of each place's parameters, at temperature 1 and without noise, by stage and place."""
        alphas = iter(self.alphas)
        out: list[list[dict[str, float]]] = [[] for _ in self.net.stages]
        for i, p in self._places():
            paths = self.paths(i, p)
            values = next(alphas).detach().double().softmax(0).tolist() if len(paths) > 1 else [1.0]
            out[i].append(dict(zip(paths, values, strict=True)))
        return out

    def importance(self) -> list[list[float]]:
        """Of each block, by stage and place: the probability that it is there, over that of the identity.

        Infinite where the space has it always there. A stage's importance is the sum over its blocks.
        """
        return [
            [(1 - p["identity"]) / p["identity"] if p.get("identity") else float("inf") for p in stage]
            for stage in self.probabilities()
        ]

    def arch(self) -> EfficientFormerArch:
        """The network of the most probable path of each place; blocks attend from the end on, up to one that pools."""
        best = [[max(p, key=lambda name: p[name]) for p in stage] for stage in self.probabilities()]
        depths = [[int(name != "identity") for name in stage] for stage in best]
        row = ["attends" if name == "attends" else "pools" for name in best[LAST] if name != "identity"]
        num_vit = row[::-1].index("pools") if "pools" in row else len(row)
        dims = list(self.net.space.largest.embed_dims)
        return EfficientFormerArch.from_args(dict(depths=depths, embed_dims=dims, num_vit=num_vit))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The net's, and the parameters of paths."""
        own = {f"alphas.{i}" for i in range(len(self.alphas))}
        return own | {f"net.{name}" for name in self.net.no_weight_decay()}

    def _places(self) -> Iterator[tuple[int, int]]:
        return ((i, p) for i, depth in enumerate(self.net.space.depths) for p in range(depth))

    def _weights(self, alpha: torch.Tensor) -> torch.Tensor:
        if self.training and self.noise != "none":
            noise = torch.rand_like(alpha)
            if self.noise == "gumbel":
                least = torch.finfo(noise.dtype).tiny
                noise = -(-noise.clamp_min(least).log()).clamp_min(least).log()
            alpha = alpha + noise
        return (alpha / self.temperature).softmax(0)

    def _path(self, stage: int, place: int, name: str, x: torch.Tensor, again: bool) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, h, w]; ``again``: activations are computed again in the backward pass."""
        if name == "identity":
            return x
        block = self.net.get_submodule(self.net.block_at(stage, place, name == "attends"))

        def run(x: torch.Tensor) -> torch.Tensor:
            return checkpointed(block, x, [m._buffers for m in block.modules()]) if again else block(x)

        if name == "pools":
            return run(x)
        return run(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
