"""Repair of a narrowed layer in closed form: what the removed units gave is regressed on those that are kept.

The layer that reads the units gets the regression's weights, so that the network keeps its shape. Ridge regression with
a penalty of 1e-3 times the mean variance, on deviations from the means, in float64.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Moments", "Reader", "correction"]

RIDGE = 1e-3


class Moments:
    """Sums over rows of values u [rows, n], and of their products with others v [rows, m].

    They are of what differs from the first rows' mean: a variance far below the squared mean is lost in float32.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._center: Any = None  # tensors as soon as there are rows
        self._u: Any = None
        self._v: Any = None
        self._uu: Any = None
        self._uv: Any = None

    def add(self, u: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Add rows; leading dimensions are rows."""
        u = u.flatten(0, -2).float()
        if self._center is None:
            self._center = u.mean(0)
        u = u - self._center
        sums = [u.sum(0), u.T @ u]
        if v is not None:
            v = v.flatten(0, -2).float()
            sums += [v.sum(0), u.T @ v]
        sums = [s.double() for s in sums]
        if self._u is None:
            self._u, self._uu, self._v, self._uv = (*sums, None, None)[:4]
        else:
            for total, new in zip((self._u, self._uu, self._v, self._uv), sums, strict=False):
                total += new
        self.rows += len(u)

    def reorder(self, order: torch.Tensor) -> None:
        """Put the entries of u in this order."""
        self._center, self._u, self._uu = self._center[order], self._u[order], self._uu[order][:, order]

    @property
    def mean(self) -> torch.Tensor:
        """Mean of u, [n]."""
        return self._center.double() + self._u / self.rows

    @property
    def second(self) -> torch.Tensor:
        """E[u u^T], [n, n]."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """Of u, [n, n].

        Raises:
            ValueError: It is not finite.
        """
        _check_finite(self._uu)
        mean = self._u / self.rows
        return self._uu / self.rows - torch.outer(mean, mean)

    @property
    def cross(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of v, [m], and covariance of u with v, [n, m].

        Raises:
            ValueError: It is not finite.
        """
        _check_finite(self._uv)
        mean = self._v / self.rows
        return mean, self._uv / self.rows - torch.outer(self._u / self.rows, mean)


def _check_finite(sums: torch.Tensor) -> None:
    if not sums.isfinite().all():
        raise ValueError("activations are NaN or infinite; the images or the model's weights are, or overflow")


def _factor(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Cholesky factor of the covariance with the penalty on its diagonal, penalty)."""
    penalty = RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky(covariance + penalty * eye), penalty


class Reader:
    """The weights that read the first units of a layer, for any number of them, from one set of moments.

    The factor of a leading block of a matrix is the leading block of its factor, so each number costs a solve.

    Args:
        moments: Of the units.
        weight: What reads all units, [out, units].
        bias: [out], or None: then nothing can take up the mean of what is removed, which the weights do instead.

    Attributes:
        kept: For whoever wants to keep what `at` returned.
    """

    def __init__(self, moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.kept: dict[Any, Any] = {}
        self.weight, self.bias = weight.double(), None if bias is None else bias.double()
        self.mean = moments.mean
        covariance = moments.second if bias is None else moments.covariance
        self.factor, self.penalty = _factor(covariance)
        self.covaries = self.weight @ covariance

    def at(self, keep: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [out, keep], bias [out]) in float64 that read the first ``keep`` entries."""
        target = self.covaries[:, :keep] + self.penalty * self.weight[:, :keep]
        weight = torch.cholesky_solve(target.T, self.factor[:keep, :keep]).T
        if self.bias is None:
            return weight, None
        return weight, self.bias + self.weight @ self.mean - weight @ self.mean[:keep]


def correction(moments: Moments, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What to add to (weight [out, n], bias [out]) so that they give the v that is missing, from u. In float64."""
    mean, cross = moments.cross
    if not has_bias:
        cross = cross + torch.outer(moments.mean, mean)
        factor, _ = _factor(moments.second)
        return torch.cholesky_solve(cross, factor).T, None
    factor, _ = _factor(moments.covariance)
    weight = torch.cholesky_solve(cross, factor).T
    return weight, mean - weight @ moments.mean
