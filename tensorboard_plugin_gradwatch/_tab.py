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

from ._cache import Cache
from ._catalogue import Series, Source, catalogue
from ._events import EventRun
from ._folders import FolderRun, Folders
from ._reader import Point, standing
from ._ridge import ridge
from ._shown import Levels, Shown, Table, Unreadable
from ._wire import pack
from .plugin import PLUGIN_NAME, SAMPLES

__all__ = ["STATIC", "GradwatchTab"]

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}
COLUMNS = 1200
MOST_COLUMNS = 100_000

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
    """Reads what gradwatch wrote: run folders below the log directory, and event files through the data provider.

    A run that has both is read from its folder, which holds every step.
    """

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        hints = getattr(context, "sampling_hints", None) or {}
        self._samples = int(hints.get(PLUGIN_NAME) or SAMPLES)
        self._folders = Folders(_root(context))
        self._cache = Cache()
        self._files = {p.relative_to(STATIC).as_posix(): p for p in STATIC.rglob("*") if p.suffix in TYPES}

    def is_active(self) -> bool:
        # TensorBoard itself looks whether there are event files with data under the plugin's name.
        return any(True for _ in self._folders)

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
        shown = self._shown(request).values()
        return _json({"runs": [{"id": s.id, "message": s.message, "last_time": s.last_time} for s in shown]})

    @_route
    def _run(self, request: Request) -> Response:
        """One run: its paths, and which statistics it has."""
        return _json(self._chosen(request).about())

    @_route
    def _matrix(self, request: Request) -> Response:
        """One statistic over paths and steps, pooled; or one row of it (`path`)."""
        shown, name = self._chosen(request), request.args.get("statistic", "")
        return self._view(request, shown, ("matrix", name), lambda: shown.statistic(name))

    @_route
    def _headline(self, request: Request) -> Response:
        """The global norm, the limit and the other headline numbers over steps."""
        shown = self._chosen(request)
        return self._view(request, shown, ("headline",), shown.headline)

    @_route
    def _scalars(self, request: Request) -> Response:
        """Every other scalar over steps."""
        shown = self._chosen(request)
        return self._view(request, shown, ("scalars",), shown.scalars)

    def _view(self, request: Request, shown: Shown, what: tuple[str, ...], make: Callable[[], Table]) -> Response:
        levels: Levels = self._cache.get((shown.id, *what), shown.stamp(*what), lambda: Levels(make()))
        table, path, column = levels.table, request.args.get("path"), None
        if path is not None:
            if path not in table.names:
                raise Unreadable(f"{shown.id} has no {what[-1]!r} of {path!r}.")
            column = table.names.index(path)
        low, high = _number(request, "from", -np.inf), _number(request, "to", np.inf)
        view = levels.view(low, high, _columns(request), column)
        header: dict[str, Any] = {"measured": view.measured, "left_out": table.left_out}
        if what[0] != "matrix":
            header["names"] = list(table.names)
        return _bytes(pack(view.steps, view.matrix, header, view.ends))

    @_route
    def _incidents(self, request: Request) -> Response:
        """Incidents as they stand now, each behind what it follows from, and the verdict."""
        incidents, verdict = self._chosen(request).incidents()
        return _json({"incidents": incidents, "verdict": verdict.to_json()})

    @_route
    def _histograms(self, request: Request) -> Response:
        """Histograms of one parameter's gradient over time."""
        steps, matrix, header = ridge(self._chosen(request).histograms(request.args.get("path", "")))
        return _bytes(pack(steps, matrix, header))

    @_route
    def _static(self, request: Request) -> Response:
        """A file of `static/`, from a fixed list: no path can lead outside."""
        file = self._files.get(request.path.partition("/static/")[2])
        if file is None:
            return _json({"message": "There is no such file."}, status=404)
        return Response(file.read_bytes(), content_type=TYPES[file.suffix] + "; charset=utf-8", headers=_HEADERS)

    def _shown(self, request: Request) -> dict[str, Shown]:
        """Return the runs by id: a folder where there is one, else event files."""
        context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        listed = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN_NAME) or {}
        found: dict[str, Shown] = {}
        for source in catalogue(listed).values():
            run = EventRun(source, functools.partial(self._read, context, experiment))
            found[run.id] = self._folder_of(source, run) or run
        named = {shown.path for shown in found.values() if isinstance(shown, FolderRun)}
        for folder in self._folders:
            if folder.path not in named:
                if isinstance(found.get(folder.id), FolderRun):  # an earlier fit's, beside it
                    folder.id = f"{folder.id}/{folder.path.name}"
                found[folder.id] = folder
        return dict(sorted(found.items()))

    def _folder_of(self, source: Source, run: EventRun) -> FolderRun | None:
        """Return the folder that a run's event files name, where it is that run's."""
        meta = self._cache.get((source.id, "folder"), run.stamp("meta"), run.meta)
        path, started = meta.get("run_dir"), meta.get("started")
        if not isinstance(path, str) or not path:
            return None
        return self._folders.named(Path(path), run=source.run, name=source.name, started=started)

    def _chosen(self, request: Request) -> Shown:
        """Return the run that the request names."""
        wanted, shown = request.args.get("run", ""), self._shown(request)
        if wanted not in shown:
            raise Unreadable(f"There is no run {wanted!r} with gradwatch data. There are {', '.join(shown) or 'none'}.")
        if shown[wanted].message:
            raise Unreadable(shown[wanted].message)
        chosen = shown[wanted]
        if isinstance(chosen, FolderRun):
            self._folders.used(chosen)
        return chosen

    def _read(self, context: Any, experiment: str, series: Series) -> list[Point]:
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
        points = (found or {}).get(series.run, {}).get(series.tag, ())
        return standing([Point(int(d.step), np.asarray(d.numpy)) for d in points])


def _root(context: Any) -> Path | None:
    """Return the log directory; None where TensorBoard reads elsewhere than on this machine's disk."""
    given = getattr(context, "logdir", None) or getattr(getattr(context, "flags", None), "logdir", None)
    if not given or "://" in str(given):
        return None
    return Path(given).expanduser().resolve()


def _number(request: Request, name: str, otherwise: float) -> float:
    try:
        value = float(request.args.get(name, otherwise))
    except ValueError:
        return otherwise
    return otherwise if np.isnan(value) else value


def _columns(request: Request) -> int:
    """Return how many columns are asked for; 0: all. What is no such number is the usual one."""
    asked = _number(request, "columns", COLUMNS)
    return int(asked) if 0 <= asked <= MOST_COLUMNS else COLUMNS


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
