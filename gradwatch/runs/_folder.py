"""The files of a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GradwatchWarning, RunFormatError
from ..records import SCHEMA_VERSION, Bools, Incident, Index
from ..sinks import RUN_FORMAT, IncidentKey, incident_key
from ..sinks.blocks import Block, scan, segment_files

__all__ = ["BlockFile", "Live", "read_annotations", "read_incidents", "read_index", "read_meta", "record_files"]


@dataclass
class BlockFile:
    """A record file, and how far it was read."""

    path: Path
    session: int
    blocks: list[Block] = field(default_factory=list)
    end: int = 0
    inode: int = -1


@dataclass(frozen=True, eq=False)
class Live:
    """A block, and which of its records hold."""

    block: Block
    rows: Bools


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json.

    Raises:
        RunFormatError: there is none, or it says something else.
    """
    file = folder / "meta.json"
    if not file.exists():
        raise RunFormatError(f"{folder} is not a run folder: it has no meta.json. A run's folder is its `run_dir`.")
    meta = _load(file)
    if not isinstance(meta, dict) or meta.get("format") != RUN_FORMAT:
        raise RunFormatError(f"{file} is not of a gradwatch run (no `format`: {RUN_FORMAT!r}).")
    _check_schema(meta, file)
    return meta


def read_index(folder: Path, number: int) -> Index:
    file = folder / f"index-{number:03d}.json"
    if not file.exists():
        raise RunFormatError(f"{file} is missing: records refer to it.")
    data = _load(file)
    try:
        _check_schema(data, file)
        return Index.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunFormatError):
            raise
        raise RunFormatError(f"{file} is not an index: {error!r}.") from None


def record_files(folder: Path, known: dict[Path, BlockFile]) -> list[BlockFile]:
    """Return the record files in order, reading on where `known` left off."""
    files = []
    for session, _, path in segment_files(folder):
        file = known.get(path)
        try:
            stat = path.stat()
        except FileNotFoundError:  # superseded, and removed just now
            continue
        # A file that was thinned is a new one under the same name.
        if file is None or file.inode != stat.st_ino or stat.st_size < file.end:
            file = known[path] = BlockFile(path, session, inode=stat.st_ino)
        if stat.st_size > file.end:
            _read_on(file)
        files.append(file)
    return files


def _read_on(file: BlockFile) -> None:
    with file.path.open("rb") as stream:
        stream.seek(file.end)
        data = stream.read()
    start = file.end
    for end, block in scan(data, where=str(file.path)):
        if block is None:
            where = f"bytes {file.end} to {start + end}"
            warnings.warn(
                f"{file.path}: {where} are damaged and left out; the rest is read.", GradwatchWarning, stacklevel=2
            )
        else:
            file.blocks.append(block)
        file.end = start + end


def read_incidents(folder: Path, starts: dict[int, float]) -> list[Incident]:
    """Return the last known state of every incident.

    Args:
        folder: of the run.
        starts: first step recorded after each session; what a session said from there on is superseded.
    """
    found: dict[IncidentKey, Incident] = {}
    for data in _lines(folder / "incidents.jsonl"):
        incident = Incident.from_json(data)
        said_at = max(incident.first_step, incident.last_step, incident.resolved_step or 0)
        if said_at < starts.get(data.get("session", 0), float("inf")):
            found[incident_key(incident)] = incident
    return sorted(found.values(), key=lambda i: (i.first_step, i.id))


def read_annotations(folder: Path, starts: dict[int, float]) -> list[dict[str, Any]]:
    """Return what rules were told, in order; see `read_incidents` for `starts`."""
    lines = _lines(folder / "annotations.jsonl")
    return [line for line in lines if line["after_step"] < starts.get(line.get("session", 0), float("inf"))]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    # A last line without its end was cut short.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError:
            data = None
        if isinstance(data, dict):
            yield data
        elif line.strip():
            warnings.warn(f"{file}, line {number} can't be read and is left out.", GradwatchWarning, stacklevel=3)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFormatError(f"{file} is not JSON: {error}.") from None


def _check_schema(data: Any, file: Path) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise RunFormatError(
            f"{file} has schema {schema!r}; this gradwatch reads up to {SCHEMA_VERSION}. Update gradwatch to read it."
        )
