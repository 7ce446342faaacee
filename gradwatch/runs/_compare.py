"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._markup import Prints
from ..records import Incident
from ._recorded import Recorded

__all__ = ["Comparison", "LayerDifference", "compare"]


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """Median gradient norm of one parameter in both runs, over the steps they share; `ratio` is b over a."""

    path: str
    a: float
    b: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Comparison(Prints):
    """How two runs differ. Prints as a table.

    Attributes:
        numbers: what -> (in a, in b); nan where a run has no such number.
        first_difference: the first step in both at which loss or global norm differ; None where they never do.
        layers: parameters by how much their gradient norms differ, the greatest first.
        only_a, only_b: incidents of a rule and first path that the other run does not have.
        settings: options, versions and the model's name where they differ -> (in a, in b).
        only_paths_a, only_paths_b: paths that the other run does not have.
        verdict_a, verdict_b: on each, in a sentence.
    """

    numbers: Mapping[str, tuple[float, float]]
    first_difference: int | None = None
    layers: list[LayerDifference] = field(default_factory=list)
    only_a: list[Incident] = field(default_factory=list)
    only_b: list[Incident] = field(default_factory=list)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    only_paths_a: list[str] = field(default_factory=list)
    only_paths_b: list[str] = field(default_factory=list)
    verdict_a: str = ""
    verdict_b: str = ""

    def __str__(self) -> str:
        lines = [f"{'':24}{'a':>14}{'b':>14}"]
        lines += [f"{name:24}{a:>14.6g}{b:>14.6g}" for name, (a, b) in self.numbers.items()]
        lines += [f"{which}: {told}" for which, told in (("a", self.verdict_a), ("b", self.verdict_b)) if told]
        step = self.first_difference
        lines += ["", "never differ" if step is None else f"first differ at step {step}"]
        lines += [f"{name}: {a!r} | {b!r}" for name, (a, b) in self.settings.items()]
        for which, incidents in (("a", self.only_a), ("b", self.only_b)):
            lines += [f"only in {which}: {incident}" for incident in incidents]
        lines += [f"gradient norm of {d.path}: x{d.ratio:.3g}" for d in self.layers[:5] if d.ratio != 1]
        return "\n".join(lines)


def compare(a: Recorded, b: Recorded, *, max_layers: int = 50) -> Comparison:
    """Return how two runs, or logs, differ."""
    paths_a, paths_b = set(a.index.paths), set(b.index.paths)
    said_a, said_b = ({(i.name or i.rule, i.first_path) for i in run.incidents} for run in (a, b))
    ours, theirs = _numbers(a), _numbers(b)
    return Comparison(
        numbers={name: (ours[name], theirs[name]) for name in ours},
        first_difference=_first_difference(a, b),
        layers=_layers(a, b)[:max_layers],
        only_a=[i for i in a.incidents if (i.name or i.rule, i.first_path) not in said_b],
        only_b=[i for i in b.incidents if (i.name or i.rule, i.first_path) not in said_a],
        settings=_settings(a.meta, b.meta),
        only_paths_a=sorted(paths_a - paths_b),
        only_paths_b=sorted(paths_b - paths_a),
        verdict_a=a.verdict().headline,
        verdict_b=b.verdict().headline,
    )


def _numbers(run: Recorded) -> dict[str, float]:
    losses, norms = run.scalar("loss")[1], run.scalar("global_norm")[1]
    finite = norms[np.isfinite(norms)]
    return {
        "steps": float(len(run)),
        "first loss": float(losses[0]) if len(losses) else float("nan"),
        "last loss": float(losses[-1]) if len(losses) else float("nan"),
        "lowest loss": float(np.nanmin(losses)) if np.isfinite(losses).any() else float("nan"),
        "median global norm": float(np.median(finite)) if len(finite) else float("nan"),
        "largest global norm": float(np.max(norms)) if len(norms) else float("nan"),
        "steps skipped": float(run.scalar("skipped")[1].sum()),
        "incidents": float(len(run.incidents)),
    }


def _first_difference(a: Recorded, b: Recorded) -> int | None:
    found = []
    for name in ("loss", "global_norm"):
        (steps_a, values_a), (steps_b, values_b) = a.scalar(name), b.scalar(name)
        shared, at_a, at_b = np.intersect1d(steps_a, steps_b, return_indices=True)
        x, y = values_a[at_a], values_b[at_b]
        found += shared[(x != y) & ~(np.isnan(x) & np.isnan(y))][:1].tolist()
    return min(found, default=None)


def _layers(a: Recorded, b: Recorded) -> list[LayerDifference]:
    if "grad_norm" not in a.columns or "grad_norm" not in b.columns:
        return []
    (steps_a, values_a), (steps_b, values_b) = a.matrix("grad_norm"), b.matrix("grad_norm")
    _, at_a, at_b = np.intersect1d(steps_a, steps_b, return_indices=True)
    found = []
    for path, i in a.index.positions.items():
        j = b.index.positions.get(path)
        if j is None:
            continue
        x, y = values_a[at_a, i], values_b[at_b, j]
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        if len(x) and len(y):
            one, two = float(np.median(x)), float(np.median(y))
            ratio = two / one if one else (1.0 if not two else float("inf"))
            found.append(LayerDifference(path=path, a=one, b=two, ratio=ratio))
    return sorted(found, key=lambda d: -abs(np.log(d.ratio)) if 0 < d.ratio < np.inf else -np.inf)


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    differing = {}
    for group in ("options", "versions"):
        mine, other = a.get(group) or {}, b.get(group) or {}
        for key in sorted({*mine, *other}):
            if mine.get(key) != other.get(key):
                differing[f"{group}.{key}"] = (mine.get(key), other.get(key))
    if a.get("model") != b.get("model"):
        differing["model"] = (a.get("model"), b.get("model"))
    return differing
