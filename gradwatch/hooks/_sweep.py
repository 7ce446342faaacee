"""What a sweep over points, heads and positions found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, MissingExtraError

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        values: the metric, float64 of shape (points, places), or (points, heads, positions) where both were swept; a
            metric that is a vector has its length last. Of several metrics the first.
        points: names, the rows.
        places: positions or heads, the columns.
        axis: `"position"` or `"head"`.
        baseline: the metric without an intervention: a number, or the vector.
        heads: where heads and positions were swept together.
        metrics: name -> values, where several were given.
        baselines: name -> baseline, likewise.
    """

    values: NDArray[np.float64]
    points: tuple[str, ...]
    places: tuple[int, ...]
    axis: str
    baseline: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    heads: tuple[int, ...] = ()
    metrics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.values, dtype=dtype)

    def normalised(self, clean: Any) -> NDArray[np.float64]:
        """Return 0 where nothing changed and 1 where the clean run's metric is fully restored."""
        if np.any(np.asarray(clean) == np.asarray(self.baseline)):
            raise ConfigError("the clean metric equals the baseline: nothing to restore.")
        changed: NDArray[np.float64] = (self.values - self.baseline) / (np.asarray(clean) - self.baseline)
        return changed

    def _rows(self) -> list[str]:
        names = [p.removesuffix(":output") for p in self.points]
        return [f"{name} {head}" for name in names for head in self.heads] if self.heads else names

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
        rows = self._rows()
        shown = np.asarray(self.values if values is None else values)
        if shown.size != len(rows) * len(self.places):
            raise ConfigError(f"a heatmap needs one number a place. Got shape {shown.shape}: give `values=`.")
        shown = shown.reshape(len(rows), len(self.places))
        size = (2.5 + 0.45 * max(len(self.places), 8), 1.6 + 0.32 * max(len(rows), 4))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        centre = self.baseline if values is None else 0.0
        reach = float(np.nanmax(np.abs(shown - centre))) if np.isfinite(shown).any() else 1.0
        reach = reach or 1.0
        image = axes.imshow(shown, cmap="RdBu_r", vmin=centre - reach, vmax=centre + reach, aspect="auto")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(len(self.places)), list(place_labels) if place_labels else [str(p) for p in self.places])
        axes.set_xlabel(self.axis)
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label=label)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
