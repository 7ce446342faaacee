"""The tab: routes over the data provider, and static files."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard import plugin_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

from ._catalogue import Series, Source, catalogue
from ._reader import Cache, Point, Table, Unreadable, read_headline, read_index, read_json, read_scalars, read_statistic
from ._ridge import exponent_row, ridge
from ._wire import pack, pool
from .plugin import PLUGIN_NAME, SAMPLES

__all__ = ["STATIC", "GradwatchTab"]

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}
COLUMNS = 1200

_log = logging.getLogger(__name__)


def _route(answer: Callable[[GradwatchTab, Request], Response]) -> Callable[..., Any]:
    """Turn a method into a WSGI application that answers every failure with a message to show."""

    @functools.wraps(answer)
    def app(self: GradwatchTab, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        request = Request(environ)
        try:
            response = answer(self, request)
        except Unreadable as problem:
            response = _json({"message": str(problem)}, status=422)
        except Exception as problem:
            _log.warning("GradWatch tab: %s failed", request.path, exc_info=True)
            response = _json({"message": f"This part of the log can't be read: {problem}"}, status=422)
        return response(environ, start_response)

    return app


class GradwatchTab(base_plugin.TBPlugin):
    """Reads what gradwatch wrote, through the data provider alone."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        hints = getattr(context, "sampling_hints", None) or {}
        self._samples = int(hints.get(PLUGIN_NAME) or SAMPLES)
        self._cache = Cache()
        self._files = {p.relative_to(STATIC).as_posix(): p for p in STATIC.rglob("*") if p.suffix in TYPES}

    def is_active(self) -> bool:
        return False  # TensorBoard itself looks whether there are data under the plugin's name.

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="GradWatch")

    def get_plugin_apps(self) -> dict[str, Any]:
        return {
            "/runs": self._runs,
            "/run": self._run,
            "/matrix": self._matrix,
            "/headline": self._headline,
            "/scalars": self._scalars,
            "/incidents": self._incidents,
            "/histograms": self._histograms,
            "/static/*": self._static,
        }

    @_route
    def _runs(self, request: Request) -> Response:
        """All runs, by id, with what can't be shown and why."""
        runs = [
            {"id": s.id, "run": s.run, "name": s.name, "message": s.message, "last_time": s.stamp[1]}
            for s in self._sources(request).values()
        ]
        return _json({"runs": runs})

    @_route
    def _run(self, request: Request) -> Response:
        """One run: its paths, and which statistics it has."""
        source, read = self._chosen(request)
        index = read_index(read, source)[-1][1]
        statistics = {
            name: {"over": str(next(iter(windows.values())).content.get("over", "parameter"))}
            for name, windows in source.statistics.items()
        }
        meta = [m for _, m in read_json(read, source.by_kind.get("meta")) if isinstance(m, dict)]
        return _json(
            {
                "id": source.id,
                "index": index,
                "statistics": statistics,
                "meta": meta[-1] if meta else {},
                "has_histograms": "histograms" in source.by_kind,
                "stamp": source.stamp,
                "notes": source.notes,
            }
        )

    @_route
    def _matrix(self, request: Request) -> Response:
        """One statistic over paths and steps, pooled; or one row of it (`path`)."""
        source, read = self._chosen(request)
        name = request.args.get("statistic", "")
        windows = source.statistics.get(name, {})
        stamp = tuple(s.stamp for s in [*windows.values(), *filter(None, [source.by_kind.get("index")])])
        table: Table = self._cache.get((source.id, name), stamp, lambda: read_statistic(read, source, name))
        steps, matrix = table.steps, table.matrix
        path = request.args.get("path")
        if path is not None:
            if path not in table.names:
                raise Unreadable(f"{source.id} has no {name!r} of {path!r}.")
            matrix = matrix[:, [table.names.index(path)]]
        inside = (steps >= _number(request, "from", -np.inf)) & (steps <= _number(request, "to", np.inf))
        steps, matrix = (steps, matrix) if inside.all() else (steps[inside], matrix[inside])
        last = steps[-1] if len(steps) else 0.0
        measured = len(steps)
        steps, matrix = pool(steps, matrix, int(_number(request, "columns", COLUMNS)))
        return _bytes(pack(steps, matrix, {"last": last, "measured": measured, "left_out": table.left_out}))

    @_route
    def _headline(self, request: Request) -> Response:
        """The global norm, the limit and the other headline numbers over steps."""
        return self._table(request, "headline", read_headline)

    @_route
    def _scalars(self, request: Request) -> Response:
        """Every other scalar over steps."""
        return self._table(request, "scalars", read_scalars)

    def _table(self, request: Request, kind: str, make: Callable[..., Table]) -> Response:
        source, read = self._chosen(request)
        series = source.by_kind.get(kind)
        stamp = series.stamp if series is not None else ()
        table: Table = self._cache.get((source.id, "/", kind), stamp, lambda: make(read, source))
        header = {"names": list(table.names), "left_out": table.left_out}
        return _bytes(pack(table.steps, table.matrix, header))

    @_route
    def _incidents(self, request: Request) -> Response:
        """Incidents as they stand now, in order of their first step."""
        source, read = self._chosen(request)
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        for _, incident in read_json(read, source.by_kind.get("incidents")):
            if isinstance(incident, dict) and "rule" in incident:
                key = (incident.get("id"), incident.get("name") or incident["rule"], incident.get("first_step"))
                newest[key] = incident
        return _json({"incidents": sorted(newest.values(), key=lambda i: (i.get("first_step") or 0, i.get("id") or 0))})

    @_route
    def _histograms(self, request: Request) -> Response:
        """Histograms of one parameter's gradient over time."""
        source, read = self._chosen(request)
        path, series = request.args.get("path", ""), source.by_kind.get("histograms")
        indexes = read_index(read, source)
        rows = []
        for point in read(series) if series is not None else ():
            index = [index for step, index in indexes if step <= point.step] or [indexes[0][1]]
            if path not in index[-1]["paths"] or np.ndim(point.value) != 2 or point.value.shape[1] < 6:
                continue
            place = index[-1]["paths"].index(path)
            for row in point.value[point.value[:, 0] == place]:
                first, counts = exponent_row(float(row[3]), float(row[4]), row[5:])
                rows.append((point.step, float(row[1]), float(row[2]), first, counts))
        steps, matrix, header = ridge(rows)
        return _bytes(pack(steps, matrix, header))

    @_route
    def _static(self, request: Request) -> Response:
        """A file of `static/`, from a fixed list: no path can lead outside."""
        file = self._files.get(request.path.partition("/static/")[2])
        if file is None:
            return _json({"message": "There is no such file."}, status=404)
        return Response(file.read_bytes(), content_type=TYPES[file.suffix] + "; charset=utf-8", headers=_HEADERS)

    def _sources(self, request: Request) -> dict[str, Source]:
        context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return catalogue(self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN_NAME) or {})

    def _chosen(self, request: Request) -> tuple[Source, Callable[[Series], list[Point]]]:
        """Return the source the request names, and a function that reads one of its series."""
        context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        wanted, sources = request.args.get("run", ""), self._sources(request)
        if wanted not in sources:
            raise Unreadable(
                f"There is no run {wanted!r} with gradwatch data. There are {', '.join(sources) or 'none'}."
            )
        if sources[wanted].message:
            raise Unreadable(sources[wanted].message)

        def read(series: Series) -> list[Point]:
            try:
                found = self._provider.read_tensors(
                    context,
                    experiment_id=experiment,
                    plugin_name=PLUGIN_NAME,
                    downsample=self._samples,
                    run_tag_filter=provider.RunTagFilter(runs=[series.run], tags=[series.tag]),
                )
            except (ValueError, TypeError) as problem:  # a tensor shorter than its shape says
                raise Unreadable(f"{series.tag} of {series.run} is damaged: {problem}") from problem
            return [
                Point(int(d.step), np.asarray(d.numpy)) for d in (found or {}).get(series.run, {}).get(series.tag, ())
            ]

        return sources[wanted], read


def _number(request: Request, name: str, otherwise: float) -> float:
    try:
        value = float(request.args.get(name, otherwise))
    except ValueError:
        return otherwise
    return otherwise if np.isnan(value) else value


_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def _json(value: Any, status: int = 200) -> Response:
    body = json.dumps(_plain(value), allow_nan=False)
    return Response(body, status=status, content_type="application/json", headers=_HEADERS)


def _plain(value: Any) -> Any:
    """Return non-finite floats as strings: JSON has none, and one of them would make a whole answer unreadable."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(body: bytes) -> Response:
    return Response(body, content_type="application/octet-stream", headers=_HEADERS)
