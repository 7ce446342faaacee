"""Pictures of runs by matplotlib: heatmaps, and curves over steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from gradwatch.report import ReportData
from gradwatch.report._svg import NORMS

__all__ = ["draw", "draw_norms", "draw_tasks"]

MISSING = -np.inf
RED, BLUE = "#e5002e", "#1f6feb"


def draw(data: ReportData, path: Path, title: str, statistic: str = "grad_norm") -> None:
    """Draw loss and global norm over a heatmap: grey zero, white not measured, red not finite."""
    table, index = data.tables[statistic], data.index
    rows = np.flatnonzero(index.is_parameter & (index.ndim >= 2))
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    values = table.values[:, rows].T.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values) & (values > 0), np.log10(values), np.nan)
    figure = Figure(figsize=(9, 2.4 + 0.16 * len(rows)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, 0.16 * len(rows)])
    curves(upper, data)
    # What is measured now and then stands until it is measured again.
    edges = np.append(table.steps, max(table.last, data.last_step) + 1)
    # One scale for all pictures of a statistic: they are there to be compared.
    low, high = {"grad_norm": (-4, 1), "update_ratio": (-6, -1)}[statistic]
    mesh = lower.pcolormesh(edges, np.arange(len(rows) + 1), logs, vmin=low, vmax=high, cmap="viridis")
    label = {"grad_norm": "gradient norm", "update_ratio": "update / weight"}[statistic]
    figure.colorbar(mesh, ax=lower, label=f"log10 {label}", fraction=0.03, pad=0.01, extend="both")
    for mask, color in ((values == 0, "#969696"), (~np.isfinite(values) & (values != MISSING), "#e5002e")):
        lower.pcolormesh(edges, np.arange(len(rows) + 1), np.where(mask, 1.0, np.nan), cmap=ListedColormap([color]))
    lower.set_yticks(np.arange(len(rows)) + 0.5, [index.paths[r] for r in rows], fontsize=7)
    lower.invert_yaxis()
    lower.set_xlabel("step")
    lower.set_xlim(edges[0], edges[-1])
    upper.set_title(title, loc="left", fontsize=10)
    for incident in data.incidents:
        for axes in (upper, lower):
            axes.axvline(incident.first_step, color="#e5002e", lw=0.8, ls=":")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Save with few colours: a picture for a page."""
    figure.savefig(path, format="png")
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path} {path.stat().st_size // 1024} kB")


def axes_of(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 3), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    return figure, axes


def draw_norms(data: ReportData, path: Path, title: str, names: dict[str, str]) -> None:
    """Draw norms over steps, and shade the steps from an incident's first to the one at which it was over.

    Args:
        names: scalar -> what the legend calls it.
    """
    figure, axes = axes_of(title)
    styles = {curve.name: curve for curve in NORMS}
    for place, (name, label) in enumerate(names.items()):
        steps, values = data.scalars[name]
        dashes = "--" if styles[name].dashes else "-"
        axes.plot(steps, values, color=f"#{styles[name].color}", ls=dashes, lw=1.2, label=label, zorder=4 - 0.1 * place)
    told = [incident for incident in data.incidents if incident.severity != "info"]
    for row, incident in enumerate(told):
        over = incident.resolved_step or data.last_step
        axes.axvspan(incident.first_step, over, color=RED, alpha=0.08, lw=0)
        place = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": RED, "va": "top"}
        axes.annotate(incident.name or incident.rule, (over + 2, 0.96 - 0.07 * row), **place)
    axes.set_yscale("log")
    axes.set_ylabel("global gradient norm", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    save(figure, path)


def draw_tasks(data: ReportData, path: Path, title: str) -> None:
    """Draw the cosine between two tasks' gradients over steps; below zero they conflict."""
    figure, axes = axes_of(title)
    (name,) = (n for n in data.scalars if n.startswith("task_cos/"))
    steps, values = data.scalars[name]
    axes.axhspan(-1, 0, color=RED, alpha=0.08, lw=0)
    axes.plot(steps, values, color=BLUE, lw=0.9)
    axes.text(steps[-1], -0.97, "conflict", fontsize=8, color=RED, ha="right")
    axes.set_ylim(-1, 1)
    axes.set_ylabel(name.replace("task_cos/", "cosine of ").replace("/", " and "), fontsize=8)
    save(figure, path)


def curves(axes: Any, data: ReportData) -> None:
    steps, losses = data.scalars["loss"]
    axes.plot(steps, losses, color="#1f6feb", lw=1)
    finite = losses[np.isfinite(losses)]
    if finite.max() > 50 * np.median(finite):
        axes.set_yscale("log")
    axes.set_ylabel("loss", color="#1f6feb", fontsize=8)
    other = axes.twinx()
    steps, norms = data.scalars["global_norm"]
    other.plot(steps, norms, color="#8b8b8b", lw=0.8)
    other.set_yscale("log")
    other.set_ylabel("global norm", color="#6b6b6b", fontsize=8)
    for each in (axes, other):
        each.tick_params(labelsize=7, which="both")
