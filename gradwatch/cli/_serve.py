"""`gradwatch serve FOLDER`: the tab of all runs below a folder, without TensorBoard. Ctrl-C ends it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ._find import existing
from ._outcome import FINE
from ._terminal import say

__all__ = ["HELP", "add_arguments", "make_app", "run"]

HELP = "the tab of all runs below a folder in a browser, without TensorBoard"
HOST = "127.0.0.1"
PORT = 6016

PAGE = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>gradwatch</title>
</head>
<body><script type="module" src="./static/serve.js"></script></body>
</html>
"""
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a run folder, or a folder above some")
    parser.add_argument("--port", type=int, default=PORT, help=f"of {HOST} (default: {PORT}; 0: a free one)")


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Nobody but this machine is answered."""
    folder = existing(options.folder, "folder")
    if not folder.is_dir():
        raise ConfigError(f"serve takes a folder of runs. Got the file {options.folder!r}.")
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port takes a number from 0 to 65535. Got {options.port}.")
    app = make_app(folder)
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *given: Any) -> None:
            pass

    try:
        server = make_server(HOST, options.port, app, threaded=True, request_handler=Quiet)
    except (OSError, SystemExit) as error:
        raise ConfigError(f"port {options.port} of {HOST} can't be had ({error}); try --port 0.") from error
    with server:
        say(f"gradwatch: runs below {folder} are shown at http://{HOST}:{server.server_port}/ - Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return FINE
    return FINE


def make_app(folder: Path) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    """Return the page and its data as a WSGI application.

    Raises:
        ConfigError: tensorboard, whose server parts it stands on, is not installed.
    """
    try:
        from tensorboard.plugins.base_plugin import TBContext
        from werkzeug import Request, Response

        from tensorboard_plugin_gradwatch._tab import GradwatchTab
    except ImportError as error:
        raise ConfigError(f"serve needs tensorboard ({error}): pip install 'gradwatch[tensorboard]'.") from error
    tab = GradwatchTab(TBContext(data_provider=_NoEvents(), logdir=str(folder)))
    routes = tab.get_plugin_apps()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        if request.host.partition(":")[0] not in (HOST, "localhost"):
            # Another site whose name was made to point here (DNS rebinding) reads nothing.
            answer: Any = Response("Ask for 127.0.0.1.", status=403)
        elif request.path == "/":
            answer = Response(PAGE, content_type="text/html; charset=utf-8")
        else:
            path = "/static/*" if request.path.startswith("/static/") else request.path
            answer = routes.get(path) or Response("There is no such page.", status=404)

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, ("Content-Security-Policy", POLICY)], *more)

        answered: Iterable[bytes] = answer(environ, start)
        return answered

    return app


class _NoEvents:
    """A data provider without event files: run folders have everything."""

    def list_tensors(self, *given: Any, **named: Any) -> dict[str, Any]:
        return {}
