"""The code in the report's page of the docs runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..tab.synthetic import write_folder

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_of_the_docs_runs(code, tmp_path, monkeypatch):
    write_folder(tmp_path / "runs" / "1", steps=40)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "report.md", "heatmap.png"}
