"""One run folder with a known story, and its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradwatch.report import ReportData
from gradwatch.runs import read_run

from ..tab.synthetic import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("runs") / "spike")


@pytest.fixture(scope="session")
def data(folder: Path) -> ReportData:
    return ReportData.from_run(read_run(folder))
