"""index-NNN.json: what the columns of records run over."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..errors import RunFormatError
from ..records import SCHEMA_VERSION, Index
from ._files import contents
from ._plain import sealed

__all__ = ["index_text", "last_index"]


def index_text(index: Index) -> str:
    """Return what stands in an index's file."""
    return sealed({"schema": SCHEMA_VERSION, **index.to_json()})


def last_index(folder: Path) -> tuple[int, str]:
    """Return number and text of the newest index in a folder; -1 and "" where there is none."""
    numbers = [path.stem.partition("-")[2] for path in folder.glob("index-*.json")]
    newest = max((int(n) for n in numbers if n.isascii() and n.isdigit()), default=-1)
    text = ""
    with suppress(OSError, RunFormatError):
        text = contents(folder / f"index-{newest:03d}.json").decode(errors="replace") if newest >= 0 else ""
    return newest, text
