"""Layer by layer: a table of what a run's gradients were like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .._markup import number
from ..records import Floats, Incident, heading, rank_incidents
from ._sparkline import sparkline
from ._terminal import Grid, columns

if TYPE_CHECKING:
    from ..report import ReportData, Table

__all__ = ["incident_grid", "layer_grid", "short"]

RANK = {"info": 0, "warning": 1, "critical": 2}


def layer_grid(data: ReportData, *, max_layers: int = 40, biases: bool = False) -> tuple[Grid, int]:
    """Return the table of parameters in forward order, and how many were left out.

    Args:
        data: of the run.
        max_layers: rows; parameters of incidents stay, then those with the smallest and the largest gradients.
        biases: show parameters of one dimension too.
    """
    index, table = data.index, data.tables.get("grad_norm")
    norm, ratio = heading("grad_norm"), heading("update_ratio")
    grid = Grid(["layer", norm, "median", "largest", "last", ratio, "incidents"], right=(2, 3, 4, 5))
    if table is None:
        return grid, 0
    measured = (table.values != -np.inf).any(axis=0)
    rows = np.flatnonzero(measured & index.is_parameter & (biases | (index.ndim >= 2)))
    if not len(rows):
        rows = np.flatnonzero(measured & index.is_parameter)
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    marks = _marks(data.incidents)
    width = 24 if columns() >= 100 else 12
    chosen = _chosen(rows, table, [index.paths[i] in marks for i in rows], max_layers)
    ratios = data.tables.get("update_ratio")
    for i in chosen:
        path, values = index.paths[i], table.values[:, i].astype(np.float64)
        told = marks.get(path, [])
        grid.add(
            path,
            sparkline(values, width),
            short(_median(values)),
            _shown(values, np.max),
            _shown(values, lambda measured: measured[-1]),
            short(_median(ratios.values[:, i].astype(np.float64))) if ratios is not None else "-",
            " ".join(dict.fromkeys(name for name, _ in told)),
            style=max((severity for _, severity in told), key=lambda s: RANK.get(s, 1), default=""),
        )
    return grid, len(rows) - len(chosen)


def incident_grid(incidents: Iterable[Incident]) -> Grid:
    """Return the incidents, each behind what it follows from."""
    grid = Grid(
        ["step", "severity", "rule", "where", "value in", "value", "bar", "state", "treated by"],
        right=(0, 5, 6),
        flexible=3,
        droppable=8,
    )
    for i, _ in rank_incidents(list(incidents)):
        more = f" +{len(i.paths) - 1}" if len(i.paths) > 1 else ""
        grid.add(
            str(i.first_step),
            i.severity,
            i.name or i.rule,
            (i.first_path or (i.paths[0] if i.paths else "whole model")) + more,
            i.worst_elsewhere,
            short(i.value),
            short(i.limit),
            _state(i),
            ", ".join(i.treatments),
            style=i.severity,
        )
    return grid


def _state(incident: Incident) -> str:
    if not incident.resolved:
        return "open"
    return "over" if incident.resolved_step is None else f"over at {incident.resolved_step}"


def short(value: float) -> str:
    """Return three digits; "-" for nan, which stands for "none" in these tables."""
    return "-" if np.isnan(value) else f"{value:.3g}"


def _marks(incidents: Iterable[Incident]) -> dict[str, list[tuple[str, str]]]:
    """Return path -> the rules that spoke of it, with severity."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for incident in incidents:
        for path in incident.paths:
            found[path].append((incident.name or incident.rule, incident.severity))
    return found


def _chosen(rows: np.ndarray, table: Table, is_marked: list[bool], max_layers: int) -> list[int]:
    if len(rows) <= max_layers:
        return [int(i) for i in rows]
    medians = np.array([_median(table.values[:, i].astype(np.float64)) for i in rows])
    order = np.argsort(np.nan_to_num(medians, nan=np.inf), kind="stable")
    # From both ends inwards, after those that an incident names.
    ends = [order[k // 2] if k % 2 == 0 else order[-1 - k // 2] for k in range(len(order))]
    marked = np.flatnonzero(is_marked).tolist()
    kept = list(dict.fromkeys([*marked[:max_layers], *ends]))[:max_layers]
    return [int(rows[k]) for k in sorted(kept)]


def _median(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _shown(values: Floats, pick: Callable[[Floats], Any]) -> str:
    """Return one of the measurements, as a notebook's card and the report give it; "-" where there is none."""
    measured = values[values != -np.inf]
    return number(float(pick(measured))) if len(measured) else "-"
