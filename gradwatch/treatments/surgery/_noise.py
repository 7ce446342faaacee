"""How much the micro-batches of one step agree: pure diagnosis from their Gramian."""

from __future__ import annotations

from torch import Tensor

from ...errors import ConfigError
from ...stats import cosines

__all__ = ["agreement_filter", "micro_agreement", "noise_moments"]


def noise_moments(gramian: Tensor, *, batch_size: float = 1.0) -> tuple[float, float]:
    """Return unbiased estimates of tr(Sigma), the gradient's variance per sample, and |g|^2, of the true gradient.

    Their ratio is the simple noise scale: the batch size from which larger ones gain little. One step's estimates are
    noisy (the second can be negative): average both over steps, then divide.

    Args:
        gramian: (k, k), of k >= 2 micro-batch gradients, each the mean over its own samples.
        batch_size: samples of one micro-batch.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, appendix A.1.
    """
    k = len(gramian)
    if k < 2 or not batch_size > 0:
        raise ConfigError(f"the noise scale needs at least 2 micro-batches of a size above 0. Got {k} of {batch_size}.")
    small, large = float(gramian.diagonal().mean()), float(gramian.mean())
    squared_norm = (k * large - small) / (k - 1)
    trace = (small - large) * batch_size / (1 - 1 / k)
    return trace, squared_norm


def micro_agreement(gramian: Tensor) -> tuple[float, float]:
    """Return the mean and the least cosine between two of k >= 2 micro-batch gradients."""
    k = len(gramian)
    matrix = cosines(gramian)
    rows, columns = matrix.new_ones(k, k).triu(1).nonzero(as_tuple=True)
    pairs = matrix[rows, columns]
    return float(pairs.mean()), float(pairs.min())


def agreement_filter(gramian: Tensor, *, distance: float = 0.97) -> Tensor:
    """Return weights that average those micro-batches which agree with the ones taken before; all 0 if no two agree.

    The first is taken; each further one joins if its cosine distance (1 - cosine) to the average so far is below
    `distance`.

    Returns:
        (k,), 0 or k / (number taken), so that with gradients already divided by k the result is their average.

    Source: Chaubard et al., "Beyond Gradient Averaging in Parallel Optimization: Improved Robustness through Gradient
    Agreement Filtering", 2024, arXiv 2412.18052.
    """
    if not 0 < distance <= 2:
        raise ConfigError(f"`distance` must be in (0, 2]. Got {distance}.")
    k = len(gramian)
    taken = gramian.new_zeros(k)
    taken[0] = 1
    for i in range(1, k):
        length = (taken @ gramian @ taken).clamp(min=0).sqrt() * gramian[i, i].sqrt()
        if float(length) > 0 and 1 - float(gramian[i] @ taken / length) < distance:
            taken[i] = 1
    number = float(taken.sum())
    return taken * (k / number) if number > 1 or k == 1 else taken * 0
