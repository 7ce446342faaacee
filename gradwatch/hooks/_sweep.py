"""Sweeps: one intervention at a time over points x positions (or heads), and what it does to a metric."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, MissingExtraError
from ._patch import patch

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        values: the metric, float64 of shape (points, places).
        points: names, the rows.
        places: positions or heads, the columns.
        axis: `"position"` or `"head"`.
        baseline: the metric without an intervention.
    """

    values: NDArray[np.float64]
    points: tuple[str, ...]
    places: tuple[int, ...]
    axis: str
    baseline: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.values, dtype=dtype)

    def normalised(self, clean: float) -> NDArray[np.float64]:
        """Return 0 where nothing changed and 1 where the clean run's metric is fully restored."""
        if clean == self.baseline:
            raise ConfigError("the clean metric equals the baseline: nothing to restore.")
        return (self.values - self.baseline) / (clean - self.baseline)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        values: Any = None,
        title: str = "",
        label: str = "metric",
        place_labels: Sequence[str] | None = None,
    ) -> Any:
        """Draw the heatmap; save it where `path` says (PNG, PDF, SVG by its ending), and return the figure.

        Args:
            path: of the picture.
            values: drawn instead, for example `normalised(clean)`.
            title: over the picture.
            label: of the colour bar.
            place_labels: of the columns, for example the tokens.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as missing:
            raise MissingExtraError("Sweep.plot", "matplotlib", "plots") from missing
        shown = self.values if values is None else np.asarray(values)
        size = (2.5 + 0.45 * max(len(self.places), 8), 1.6 + 0.32 * max(len(self.points), 4))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        centre = self.baseline if values is None else 0.0
        reach = float(np.nanmax(np.abs(shown - centre))) if np.isfinite(shown).any() else 1.0
        reach = reach or 1.0
        image = axes.imshow(shown, cmap="RdBu_r", vmin=centre - reach, vmax=centre + reach, aspect="auto")
        axes.set_yticks(range(len(self.points)), [p.removesuffix(":output") for p in self.points])
        axes.set_xticks(range(len(self.places)), list(place_labels) if place_labels else [str(p) for p in self.places])
        axes.set_xlabel(self.axis)
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label=label)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def sweep(  # noqa: PLR0913
    manager: HookManager,
    points: Any,
    positions: Sequence[int] | None,
    metric: Callable[[Any], Any],
    *,
    inputs: Any,
    source: Any = None,
    heads: Sequence[int] | None = None,
    intervention: Callable[..., Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Sweep:
    """See `HookManager.sweep`."""
    if (positions is None) == (heads is None):
        raise ConfigError("a sweep runs over `positions` or over `heads`: give one of them.")
    if source is None and intervention is None:
        raise ConfigError("a sweep needs a `source` to patch from (a Cache), or an `intervention`.")
    axis, places = ("position", positions) if heads is None else ("head", heads)
    places = tuple(int(p) for p in (places or ()))
    spots = manager._resolver.resolve(points)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)

    def run(hooks: list[Any]) -> float:
        output = manager.run_with_hooks(*args, hooks=hooks, **(model_kwargs or {}))
        return float(metric(output))

    def change(place: int) -> Any:
        where = {"positions": place} if axis == "position" else {"heads": place}
        return intervention(**where) if intervention is not None else patch(source, **where)

    values = np.full((len(spots), len(places)), np.nan)
    with torch.no_grad():
        baseline = run([])
        for row, spot in enumerate(spots):
            for column, place in enumerate(places):
                values[row, column] = run([(spot, change(place))])
            if progress:
                _show_progress(row + 1, len(spots), spot)
    return Sweep(values, tuple(str(s) for s in spots), places, axis, baseline)


def _show_progress(done: int, total: int, name: str) -> None:
    width = 30
    filled = width * done // total
    end = "\n" if done == total else ""
    sys.stderr.write(f"\rsweep [{'#' * filled}{'.' * (width - filled)}] {done}/{total} {name:<40.40}{end}")
    sys.stderr.flush()
