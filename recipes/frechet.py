"""The Fréchet distance between two sets of features, each taken for a normal distribution: the formula of the FID."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normal:
    """Mean of shape (D,) and covariance of shape (D, D), both float64."""

    mean: Tensor
    covariance: Tensor


def fit(features: Tensor) -> Normal:
    """The normal distribution with mean and unbiased covariance of features.

    Args:
        features: Shape (N, D), N at least 2.

    Raises:
        ValueError: There are fewer than two, or one is not finite.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"A normal distribution needs two or more rows of features, got shape {[*features.shape]}.")
    features = features.detach().double()
    if not bool(features.isfinite().all()):
        raise ValueError("A feature is not finite.")
    return Normal(features.mean(0), torch.cov(features.T, correction=1).reshape(features.shape[1], -1))


def squared_distance(a: Normal, b: Normal) -> float:
    """Square of the Fréchet distance, which is also the 2-Wasserstein distance (Dowson and Landau, 1982).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)), at least 0. The FID of Heusel et al. (2017) is
    this number for features of an Inception network; for any other features it is comparable only with itself.
    """
    root = _root(a.covariance)
    # The product is similar to S_a S_b, and symmetric: its root needs eigenvalues only.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    value = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(value), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance; rounding makes eigenvalues near zero negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
