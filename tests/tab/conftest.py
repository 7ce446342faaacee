"""Runs written once a session, and the tab over TensorBoard's own readers, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from werkzeug.test import Client

from tensorboard_plugin_gradwatch import plugin

from .synthetic import write_events


class Tab:
    """The tab's routes over a folder of runs, read by TensorBoard's Python loader."""

    def __init__(self, logdir: Path, samples: int = plugin.SAMPLES) -> None:
        multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={plugin.PLUGIN_NAME: samples})
        multiplexer.AddRunsFromDirectory(str(logdir))
        multiplexer.Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
        context = base_plugin.TBContext(
            data_provider=provider, logdir=str(logdir), sampling_hints={plugin.PLUGIN_NAME: samples}
        )
        loaded = plugin.GradwatchPlugin().load(context)
        assert loaded is not None
        self.plugin: Any = loaded
        self._apps = loaded.get_plugin_apps()

    def get(self, route: str, **query: object) -> Any:
        """Return werkzeug's response to a request."""
        app = self._apps["/static/*" if route.startswith("/static/") else route]
        return Client(app).get(route, query_string={k: str(v) for k, v in query.items()})

    def json(self, route: str, **query: object) -> Any:
        response = self.get(route, **query)
        assert response.status_code == 200, response.text
        return json.loads(response.data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="session")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_events(folder / "spike")
    write_events(folder / "healthy", ill=False, incidents=[], tasks=False, steps=120)
    return folder


@pytest.fixture(scope="session")
def tab(logdir: Path) -> Tab:
    return Tab(logdir)


@pytest.fixture
def open_tab() -> Callable[[Path], Tab]:
    return Tab
