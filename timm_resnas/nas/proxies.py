"""Training-free scores of networks, higher is better: what they are worth is to be measured, not assumed.

All depend strongly on a network's size; `params` and `macs` are among them, as the controls that the others must beat.
Nothing of a supernet changes while its sub-networks are scored: each is computed on a copy of its slice of the weights,
in evaluation mode, and no random number is drawn.

Papers:
    "Training-free Transformer Architecture Search" (TF-TAS, DSS-indicator) - https://arxiv.org/abs/2203.12217
    "SNIP: Single-shot Network Pruning based on Connection Sensitivity" - https://arxiv.org/abs/1810.02340
    "Pruning neural networks without any data by iteratively conserving synaptic flow" - https://arxiv.org/abs/2006.05467
    "Neural Architecture Search without Training" (NASWOT) - https://arxiv.org/abs/2006.04647
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..arch import Arch, Units
from .evaluate import FIXED_POINT, Evaluator
from .supernet import Supernet

__all__ = ["PROXIES", "Maps", "ProxyEvaluator", "linear_maps", "proxy_score", "proxy_scores", "score_network"]


class Maps(NamedTuple):
    """Linear maps of a network's attention and MLPs, by the names of their weights.

    Attributes:
        attention: Of queries, keys, values (one stacked matrix where the network has it so) and output projections.
        mlp: Both of each MLP.
        readers: Those that read heads or hidden units: the last of each attention and MLP.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    readers: tuple[str, ...]


def linear_maps(model: nn.Module, units: Iterable[Units], own_key: Callable[[str], str] = lambda name: name) -> Maps:
    """Which weights of a network are whose.

    Args:
        model: The network.
        units: Of the network, or of a supernet that it was extracted from.
        own_key: The supernet's name of a weight of the network.
    """
    kinds: dict[str, str] = {}
    readers = set()
    for unit in units:
        weights = [part.param for part in unit.parts if part.param.endswith("weight")]
        # a head has many entries, a hidden unit one
        kinds.update(dict.fromkeys(weights, "attention" if max(p.width for p in unit.parts) > 1 else "mlp"))
        readers.add(unit.parts[-1].param)
    names = [(name, own_key(name)) for name, param in model.named_parameters() if param.ndim > 1]
    return Maps(
        tuple(name for name, own in names if kinds.get(own) == "attention"),
        tuple(name for name, own in names if kinds.get(own) == "mlp"),
        tuple(name for name, own in names if own in readers),
    )


# -- scores ------------------------------------------------------------------------------------------------------------


def _dss(model: nn.Module, maps: Maps, images: torch.Tensor, labels: Any) -> float:
    """TF-TAS's indicator as published: all weights made positive, see `_synaptic`."""
    _make_positive(model.state_dict().values())
    return _synaptic(model, maps.attention, maps.mlp, images)


def _dss_raw(model: nn.Module, maps: Maps, images: torch.Tensor, labels: Any) -> float:
    """The same with the weights as they are."""
    return _synaptic(model, maps.attention, maps.mlp, images)


def _dss_released(model: nn.Module, maps: Maps, images: torch.Tensor, labels: Any) -> float:
    """What the paper's program computes: only tokens and positions are made positive, and of attention only the output
    projections count, for its slices of qkv carry no gradient."""
    params = dict(model.named_parameters())
    _make_positive(p for name, p in params.items() if name.split(".")[-1] in ("cls_token", "pos_embed"))
    return _synaptic(model, [name for name in maps.attention if name in maps.readers], maps.mlp, images)


def _synaptic(model: nn.Module, attention: Sequence[str], mlp: Sequence[str], images: torch.Tensor) -> float:
    """With R the sum of the logits of one image of ones: over attention's weights |dR/dW|* |W|* (nuclear norms, the
    synaptic diversity), and over the MLPs' the sum of |dR/dW W| (synaptic saliency)."""
    names = [*attention, *mlp]
    if not names:  # all blocks are absent
        return 0.0
    weights = [model.get_parameter(name) for name in names]
    grads = torch.autograd.grad(model(torch.ones_like(images[:1])).sum(), weights)
    total = 0.0
    for name, weight, grad in zip(names, weights, grads, strict=True):
        if name in attention:
            total += _nuclear_norm(grad) * _nuclear_norm(weight)
        else:
            total += (grad * weight).abs().sum(dtype=torch.float64).item()
    return total


def _nuclear_norm(weight: torch.Tensor) -> float:
    """Sum of the singular values of a matrix, or of a convolution's kernel as [out, in * k * k]."""
    matrix = weight.detach().flatten(1).cpu().double()
    if len(matrix) < matrix.shape[1]:
        matrix = matrix.T
    # several times faster than singular values; those that rounding adds to zero are 1e-8 of the largest
    return torch.linalg.eigvalsh(matrix.T @ matrix).clamp_min(0).sqrt().sum().item()


def _snip(model: nn.Module, maps: Maps, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of |dL/dW W| over the weights of linear and convolutional layers, L the cross-entropy of the images."""
    return _saliency(model, lambda: F.cross_entropy(model(images), labels))


def _synflow(model: nn.Module, maps: Maps, images: torch.Tensor, labels: Any) -> float:
    """Logarithm of SynFlow: the sum of |dR/dW W| over the same weights, R as in DSS, all weights made positive."""
    model.double()  # products of many layers
    _make_positive(model.state_dict().values())
    ones = torch.ones_like(images[:1], dtype=torch.float64)
    return torch.tensor(_saliency(model, lambda: model(ones).sum()), dtype=torch.float64).log().item()


def _saliency(model: nn.Module, value: Callable[[], torch.Tensor]) -> float:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    weights = [m.weight for m in layers]
    grads = torch.autograd.grad(value(), weights, allow_unused=True)
    pairs = zip(weights, grads, strict=True)
    return sum((w * g).abs().sum(dtype=torch.float64).item() for w, g in pairs if g is not None)


def _naswot(model: nn.Module, maps: Maps, images: torch.Tensor, labels: Any) -> float:
    """Logarithm of the determinant of how often each two images agree in which hidden units of the MLPs are active.

    Active is a positive output of the activation: the paper's networks have ReLU.
    """
    agreement = torch.zeros(len(images), len(images), dtype=torch.float64)

    def count(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        active = (inputs[0] > 0).flatten(1).float()
        agreement.add_((active @ active.T + (1 - active) @ (1 - active).T).cpu().double())

    readers = [name.rpartition(".")[0] for name in maps.readers if name in maps.mlp]
    if not readers:
        return 0.0
    handles = [model.get_submodule(name).register_forward_pre_hook(count) for name in readers]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.linalg.eigvalsh(agreement)
    return values.clamp_min(1e-12 * values.max().item()).log().sum().item()  # where images are alike it is singular


def _make_positive(tensors: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.abs_()


PROXIES: dict[str, Callable[[nn.Module, Maps, Any, Any], float] | None] = {
    "dss": _dss,
    "dss_raw": _dss_raw,
    "dss_released": _dss_released,
    "snip": _snip,
    "synflow": _synflow,
    "naswot": _naswot,
    "params": None,  # costs, which need no network
    "macs": None,
}


def score_network(
    name: str, model: nn.Module, maps: Maps, images: torch.Tensor, labels: torch.Tensor | None = None
) -> float:
    """A network's score by one of `PROXIES` that needs its weights. The network is changed: pass a copy.

    Args:
        name: Of the score.
        model: The network.
        maps: Of the network.
        images: [B, C, H, W]; only the shape counts, but for snip and naswot.
        labels: [B], for snip.
    """
    model.eval().requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad():
        proxy = PROXIES[name]
        assert proxy is not None, f"{name} is a cost"
        return proxy(model, maps, images, labels)


def proxy_scores(
    names: Iterable[str],
    net: Supernet,
    arch: Arch,
    images: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> dict[str, float]:
    """A sub-network's scores by some of `PROXIES`, with the supernet's weights as they are.

    Args:
        names: Of the scores.
        net: The supernet; nothing of it changes.
        arch: The sub-network.
        images: [B, C, H, W] on the supernet's device; see `score_network`.
        labels: [B], for snip.

    Raises:
        ArchError: The architecture does not fit in the supernet.
    """
    found: dict[str, float] = {}
    device, model = next(net.parameters()).device, None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode(False):
        for name in names:
            if PROXIES[name] is None:
                found[name] = float(arch.costs(**net.space.model_args)[name])
                continue
            if model is None:
                model = net.extract(arch)
                maps = linear_maps(model, net.units(), lambda key: net.own_key(arch, key))
            found[name] = score_network(name, copy.deepcopy(model), maps, cast(torch.Tensor, images), labels)
    return found


def proxy_score(
    name: str, net: Supernet, arch: Arch, images: torch.Tensor | None = None, labels: torch.Tensor | None = None
) -> float:
    """One of `proxy_scores`."""
    return proxy_scores([name], net, arch, images, labels)[name]


class ProxyEvaluator(Evaluator):
    """Scores sub-networks without training; otherwise as `Evaluator`: caching, files, several processes.

    Scores are fixed-point numbers, in units of `score_unit`; a record's ``value`` is the score itself.

    Args:
        net: The supernet whose weights are used.
        score: One of `PROXIES`.
        images: See `score_network`.
        labels: The same.
        fingerprint: See `Evaluator`.
        **kwargs: Of `Evaluator`: ``folder``, ``rank``, ``world``, ``gather``, ``next_index``.
    """

    def __init__(
        self,
        net: Supernet,
        score: str,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(net, [], fingerprint=f"{fingerprint} {score}", **kwargs)
        self.proxy, self.images, self.labels = score, images, labels

    def _count(self, archs: list[Arch], at_least: int | None) -> list[dict[str, Any]]:
        values = [proxy_score(self.proxy, self.net, arch, self.images, self.labels) for arch in archs]
        for arch, value in zip(archs, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"the score {self.proxy} of {arch.key():.80} is {value}; take another --score")
        return [
            {"key": arch.key(), "score": round(value * FIXED_POINT), "value": value}
            for arch, value in zip(archs, values, strict=True)
        ]
