"""One look at a running job."""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import HEALTHY, NOT_HEALTHY, Floats, Incident, Verdict
from ._layers import incident_grid, short
from ._sparkline import sparkline
from ._terminal import Grid

if TYPE_CHECKING:
    from ..runs import Run

__all__ = ["Frame", "LayerLook", "is_over", "look"]

MAX_INCIDENTS = 8
RECENT = 200


@dataclass(frozen=True, kw_only=True)
class LayerLook:
    """A parameter's gradient norm over the recent steps: `ratio` is the last over the median of those before."""

    path: str
    recent: Floats
    last: float
    median: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is shown at one time.

    Attributes:
        name, model: of the run.
        step: the last one recorded, -1 before the first.
        steps_per_second: over the recent steps; nan where not known.
        age: seconds since the last record.
        is_over: the run has ended, well or not.
        curves: name -> values over the whole run.
        last: name -> the newest value.
        layers: the worst first: non-finite, zero, then by how far they are from their own level.
        incidents: of the whole run.
        verdict: on the run as far as it is on record.
    """

    name: str
    model: str
    step: int
    steps_per_second: float
    age: float
    is_over: bool
    curves: dict[str, Floats]
    last: dict[str, float]
    layers: list[LayerLook]
    incidents: list[Incident]
    verdict: Verdict

    def lines(self, width: int) -> list[tuple[str, str]]:
        """Return lines with their styles."""
        state = "over" if self.is_over else f"{self.age:.0f} s ago"
        speed = f", {self.steps_per_second:.3g} steps/s" if np.isfinite(self.steps_per_second) else ""
        out = [(f"{self.name} {self.model}: step {self.step} ({state}{speed}), lr {short(self.last['lr'])}", "head")]
        for name, values in self.curves.items():
            decades = 0.1 if name == "loss" else 1.0
            out.append(
                (f"{name:12} {sparkline(values, min(48, width - 24), decades=decades)}  {short(values[-1])}", "")
            )
        if self.layers:
            grid = Grid(["worst layers", "recent gradient norm", "median", "last", "last/median"], right=(2, 3, 4))
            for w in self.layers:
                grid.add(w.path, sparkline(w.recent, 20), *(f"{v:.3g}" for v in (w.median, w.last, w.ratio)))
            out += [("", ""), *((line, "head" if i == 0 else "") for i, line in enumerate(grid.lines(width)))]
        style = {HEALTHY: "fine", NOT_HEALTHY: "warning"}.get(self.verdict.state, "info")
        out += [("", ""), (self.verdict.headline, style)]
        if not self.incidents:
            return out
        recent = incident_grid(self.incidents[-MAX_INCIDENTS:])
        head, *rows = recent.lines(width)
        out += [(head, "head"), *zip(rows, recent.styles, strict=True)]
        more = len(self.incidents) - MAX_INCIDENTS
        return [*out, (f"and {more} before these", "dim")] if more > 0 else out

    def document(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "name": self.name,
            "model": self.model,
            "step": self.step,
            "steps_per_second": self.steps_per_second,
            "age_seconds": self.age,
            "over": self.is_over,
            **self.last,
            "layers": [{"path": w.path, "last": w.last, "median": w.median, "ratio": w.ratio} for w in self.layers],
            "incidents": [i.to_json() for i in self.incidents],
            "verdict": self.verdict.state,
            "headline": self.verdict.headline,
        }


def look(run: Run, *, max_layers: int = 12) -> Frame:
    """Return what there is to see of a run now."""
    steps, times = run.steps(), run.scalar("time")[1]
    curves = {name: run.scalar(name)[1] for name in ("loss", "global_norm")}
    newest = {**curves, "lr": run.scalar("lr")[1]}
    recent = slice(-RECENT, None)
    passed = float(times[-1] - times[recent][0]) if len(times) else 0.0
    return Frame(
        name=run.path.parent.name if run.path.name == run.meta.get("name") else run.path.name,
        model=str(run.meta.get("model", "")),
        step=int(steps[-1]) if len(steps) else -1,
        steps_per_second=float(steps[-1] - steps[recent][0]) / passed if passed > 0 else float("nan"),
        age=max(time() - float(times[-1]), 0.0) if len(times) else float("nan"),
        is_over=is_over(run),
        curves={name: values for name, values in curves.items() if len(values)},
        last={name: float(values[-1]) if len(values) else float("nan") for name, values in newest.items()},
        layers=_layers(run)[:max_layers],
        incidents=list(run.incidents),
        verdict=run.verdict(),
    )


def is_over(run: Run) -> bool:
    """Return whether the run's last session was closed; one that was killed never is."""
    sessions = run.meta.get("sessions") or [{}]
    return run.complete or sessions[-1].get("finished") is not None


def _layers(run: Run) -> list[LayerLook]:
    if "grad_norm" not in run.columns:
        return []
    index = run.index
    _, values = run.matrix("grad_norm")
    values, measured = values[-RECENT:], run.measured("grad_norm")[-RECENT:]
    found = []
    for i in np.flatnonzero(measured.any(axis=0) & (index.ndim >= 2)).tolist():
        seen = values[measured[:, i], i]
        finite = seen[:-1][np.isfinite(seen[:-1])]
        median, last = float(np.median(finite)) if len(finite) else float("nan"), float(seen[-1])
        ratio = last / median if median > 0 else float("nan")
        curve = np.where(measured[:, i], values[:, i], -np.inf)
        found.append(LayerLook(path=index.paths[i], recent=curve, last=last, median=median, ratio=ratio))
    return sorted(found, key=_badness, reverse=True)


def _badness(layer: LayerLook) -> float:
    if not np.isfinite(layer.last):
        return float("inf")
    if layer.last == 0:
        return 1e6
    return abs(float(np.log10(layer.ratio))) if 0 < layer.ratio < np.inf else 0.0
