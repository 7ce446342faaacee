"""The heatmap as a picture, through matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensorboard_plugin_gradwatch import MISSING

from .._text import printable
from ..errors import ConfigError, UnknownNameError
from ._data import ReportData
from ._summary import summarise

__all__ = ["write_png"]


def write_png(data: ReportData, path: str | Path, *, statistic: str = "grad_norm", biases: bool = False) -> None:
    """Draw layer by step, colour by size: grey zero, white not measured, red not finite.

    Raises:
        ConfigError: matplotlib is not installed.
        UnknownNameError: the run has no such statistic.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ConfigError(
            'A PNG needs matplotlib, which is not installed: pip install "gradwatch[plots]", or ask for html.'
        ) from problem
    table = data.tables.get(statistic)
    if table is None:
        raise UnknownNameError("statistic", statistic, data.tables, where=data.name)
    measured = (table.values != MISSING).any(axis=0)
    wide = data.index.is_module | (data.index.ndim > 1) | biases
    rows = np.flatnonzero(measured & wide) if (measured & wide).any() else np.flatnonzero(measured)
    rows = rows[np.argsort(data.index.depth[rows], kind="stable")]
    values = table.values[:, rows].T.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values) & (values > 0), np.log10(np.abs(values)), np.nan)
    seen = logs[np.isfinite(logs)]
    low, high = np.percentile(seen, [1, 99.5]) if len(seen) else (-6.0, 0.0)
    figure = Figure(figsize=(11, min(14.0, max(3.0, 1.4 + 0.17 * len(rows)))), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.append(table.steps, table.last + 1) if len(table.steps) else np.array([0.0, 1.0])
    ys = np.arange(len(rows) + 1)
    if len(rows) and len(table.steps):
        mesh = axes.pcolormesh(edges, ys, logs, vmin=low, vmax=max(high, low + 0.5), cmap="viridis", rasterized=True)
        figure.colorbar(mesh, ax=axes, label=f"log10 {statistic}", fraction=0.03, pad=0.01)
        for mask, color in ((values == 0, "#969696"), (~np.isfinite(values) & (values != MISSING), "#e5002e")):
            spots = np.where(mask, 1.0, np.nan)
            axes.pcolormesh(edges, ys, spots, cmap=ListedColormap([color]), rasterized=True)
    every = max(1, len(rows) // 60)
    axes.set_yticks(ys[:-1:every] + 0.5, [_plain(data.index.paths[r]) for r in rows[::every]], fontsize=7)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a dollar in a name is no formula
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title(_title(data, statistic), loc="left", fontsize=10, parse_math=False)
    for incident in data.incidents:
        axes.axvline(
            incident.first_step, color="#e5002e" if incident.severity == "critical" else "#e07b00", lw=0.8, ls=":"
        )
    figure.savefig(path, format="png")


def _title(data: ReportData, statistic: str) -> str:
    headline = summarise(data).headline
    told = headline if len(headline) <= 120 else headline[:117] + "..."
    return _plain(f"{data.name}: {statistic}\n{told}")


def _plain(text: str) -> str:
    return printable(text if len(text) <= 300 else text[:297] + "...")
