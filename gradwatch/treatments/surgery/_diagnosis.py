"""What a Gramian says about the tasks, as scalars for the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ...stats import cosines as cosines_of

__all__ = ["combined", "conflicts", "describe", "describe_treatment", "merge"]


def conflicts(gramian: Tensor) -> bool:
    """Return whether two tasks' gradients point apart (a negative inner product)."""
    return bool((gramian < 0).any())


def describe(gramian: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the diagnosis of one (k, k) float64 CPU Gramian by scalar name.

    `task_norm/<a>`; `task_cos/<a>/<b>` and `task_similarity/<a>/<b>` (gradient magnitude similarity
    2|a||b| / (|a|^2 + |b|^2), 1 for equal lengths, of Yu et al., arXiv 2001.06782, definition 2) for each pair in the
    order of the names; `conflict_rate`, the share of pairs with a negative cosine.
    """
    norms = gramian.diagonal().clamp(min=0).sqrt().tolist()
    squares = gramian.diagonal().tolist()
    cosines = cosines_of(gramian).tolist()
    scalars = {f"task_norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
    negative = 0
    pairs = list(combinations(range(len(names)), 2))
    for i, j in pairs:
        both = squares[i] + squares[j]
        scalars[f"task_cos/{names[i]}/{names[j]}"] = cosines[i][j]
        scalars[f"task_similarity/{names[i]}/{names[j]}"] = 2 * norms[i] * norms[j] / both if both > 0 else float("nan")
        negative += cosines[i][j] < 0
    scalars["conflict_rate"] = negative / len(pairs) if pairs else 0.0
    return scalars


def combined(gramian: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return |d| / |sum g| and cos(d, sum g) of the combined gradient d; nan where they do not exist."""
    ones = torch.ones_like(weights)
    scale = gramian.diagonal().sum()
    G = gramian / scale
    plain = max(float(ones @ G @ ones), 0.0) ** 0.5
    length = max(float(weights @ G @ weights), 0.0) ** 0.5
    dot = float(weights @ G @ ones)
    ratio = length / plain if plain > 0 else float("nan")
    cosine = max(-1.0, min(1.0, dot / (length * plain))) if length * plain > 0 else float("nan")
    return ratio, cosine


def describe_treatment(
    gramian: Tensor, names: Sequence[str], weights: Tensor, *, applied: bool, fallback: bool
) -> dict[str, float]:
    """Return what surgery did: `surgery_weight/<a>`, `surgery_length_ratio`, `surgery_cos_to_sum`, and flags."""
    scalars = {f"surgery_weight/{name}": w for name, w in zip(names, weights.tolist(), strict=True)}
    scalars["surgery_length_ratio"], scalars["surgery_cos_to_sum"] = combined(gramian, weights)
    scalars["surgery_applied"] = float(applied)
    scalars["surgery_fallback"] = float(fallback)
    return scalars


def merge(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one dict of scalars for the micro-batches of a step: means, and for the fallback flag the maximum."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(key for scalars in measured for key in scalars):
        values = [scalars[name] for scalars in measured if name in scalars]
        merged[name] = max(values) if name == "surgery_fallback" else sum(values) / len(values)
    return merged
