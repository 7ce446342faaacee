"""The files of a run folder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._warn import warn
from ..errors import RunFormatError
from ..records import SCHEMA_VERSION, Incident, Index
from ..sinks import RUN_FORMAT, IncidentKey, incident_key
from ..sinks._files import contents
from ..sinks._plain import is_sealed_well
from ..sinks.blocks import FOLDER_SCHEMA, Block, Damage, journal_files, scan, segment_files
from ._sound import (
    UNREADABLE,
    NewerError,
    is_count,
    refuse_higher,
    sound_annotation,
    sound_incident,
    sound_index,
    sound_meta,
)

__all__ = [
    "BlockFile",
    "is_run_file",
    "known_meta",
    "may_hold_run",
    "read_annotations",
    "read_incidents",
    "read_index",
    "read_journals",
    "read_meta",
    "read_summary",
    "record_files",
    "records_of",
    "tell_missing_lines",
]


@dataclass
class BlockFile:
    """A record file or a journal, and how far it was read.

    Attributes:
        end: of the last whole block.
        tail: what is behind it, where that is no whole block (yet).
    """

    path: Path
    session: int
    blocks: list[Block] = field(default_factory=list)
    end: int = 0
    inode: int = -1
    tail: Damage | None = None


def is_run_file(name: str) -> bool:
    """Return whether a file's name makes its folder a run's: records may be there, and `meta.json` lost."""
    return name == "meta.json" or name.endswith((".gwr", ".gwj"))


def may_hold_run(folder: Path) -> bool:
    """Return whether a folder has files of a run's."""
    try:
        return any(is_run_file(path.name) for path in folder.iterdir())
    except OSError:
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json, or what can be said without it where there are records beside a damaged one, with a warning.

    Raises:
        RunFormatError: there is none, or it says something else.
    """
    meta, damage = known_meta(folder)
    if damage:
        warn(damage, stacklevel=3)
    return meta


def known_meta(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what `read_meta` does, and what is wrong with it; "" for nothing."""
    file = folder / "meta.json"
    has_records = bool(segment_files(folder) or journal_files(folder))
    if not file.exists() and not file.is_symlink() and not has_records:
        raise RunFormatError(f"{folder} is not a run folder: it has no meta.json. A run's folder is its `run_dir`.")
    try:
        meta, is_intact = _load(file)
        if not isinstance(meta, dict) or meta.get("format") != RUN_FORMAT:
            raise RunFormatError(f"{file} is not of a gradwatch run (no `format`: {RUN_FORMAT!r}).")
        refuse_higher(meta.get("schema"), FOLDER_SCHEMA, file)
    except NewerError:
        raise
    except RunFormatError as error:
        if file.is_symlink() or not has_records:
            raise
        lost = {"format": RUN_FORMAT, "schema": FOLDER_SCHEMA, "name": "gradwatch", "model": ""}
        return sound_meta(lost), f"{error} The records beside it are read."
    doubt = f"{file} is not what was written: its checksum differs. What it says is not sure."
    return sound_meta(meta), "" if is_intact else doubt


def read_index(folder: Path, number: int) -> Index:
    """Return an index.

    Raises:
        RunFormatError: it is missing, or damaged.
    """
    file = folder / f"index-{number:03d}.json"
    if not file.exists():
        raise RunFormatError(f"{file} is missing: records refer to it.")
    data, is_intact = _load(file)
    refuse_higher(data.get("schema") if isinstance(data, dict) else None, SCHEMA_VERSION, file)
    if not is_intact:
        raise RunFormatError(f"{file} is not what was written: its checksum differs.")
    try:
        return sound_index(data)
    except UNREADABLE as error:
        if isinstance(error, RunFormatError):
            raise
        raise RunFormatError(f"{file} is not an index: {error!r}.") from None


def record_files(folder: Path, known: dict[Path, BlockFile]) -> list[BlockFile]:
    """Return the record files in order, reading on where `known` left off."""
    return _block_files(segment_files(folder), known)


def read_journals(folder: Path, known: dict[Path, BlockFile]) -> list[BlockFile]:
    """Return the journals in order, reading on where `known` left off. Read them before the record files: what is
    folded meanwhile is then seen twice, not missed."""
    return _block_files(journal_files(folder), known)


def _block_files(found: list[tuple[int, int, Path]], known: dict[Path, BlockFile]) -> list[BlockFile]:
    files = []
    for session, _, path in found:
        file = known.get(path)
        try:
            stat = path.lstat()
            # A file that was thinned is a new one under the same name.
            if file is None or file.inode != stat.st_ino or stat.st_size < file.end:
                file = known[path] = BlockFile(path, session, inode=stat.st_ino)
            if stat.st_size > file.end:
                _read_on(file)
        except FileNotFoundError:  # superseded or folded, and removed just now
            continue
        except (OSError, RunFormatError) as error:
            if isinstance(error, RunFormatError) and "Update gradwatch" in str(error):
                raise  # a block of a higher schema
            warn(f"{path} can't be read, and what it holds is missing: {error}", stacklevel=5)
            continue
        files.append(file)
    return files


def _read_on(file: BlockFile) -> None:
    data, start = contents(file.path, file.end), file.end
    file.tail = None
    for end, found in scan(data, where=str(file.path)):
        if isinstance(found, Block):
            file.blocks.append(found)
        elif found.is_tail:
            file.tail = found
            return
        else:
            where = f"bytes {start + found.start} to {start + found.end}"
            warn(f"{file.path}: {where} are damaged and left out{_lost(found)}; the rest is read.", stacklevel=6)
        file.end = start + end


def _lost(damage: Damage) -> str:
    """Return what is missing by it, in words that go on a sentence; "" where that can't be told from it."""
    if damage.count is None or damage.steps is None:
        return ""
    first, last = damage.steps
    return f" ({damage.count:,} records of steps {first:,} to {last:,})"


def records_of(block: Block) -> str:
    """Return which records a block says that it holds; "" where it does not even say that."""
    steps = block.arrays.get("step")
    if steps is None or not steps.size or steps.dtype.kind != "i":
        return ""
    return f" ({steps.size:,} records of steps {int(steps.min()):,} to {int(steps.max()):,})"


def read_incidents(folder: Path, starts: dict[int, float]) -> list[Incident]:
    """Return the last known state of every incident.

    Args:
        folder: of the run.
        starts: first step recorded after each session; what a session said from there on is superseded.
    """
    found: dict[IncidentKey, Incident] = {}
    file = folder / "incidents.jsonl"
    for number, data in _lines(file):
        incident = sound_incident(data)
        if incident is None:
            _left_out(file, number)
            continue
        said_at = max(incident.first_step, incident.last_step, incident.resolved_step or 0)
        if said_at < starts.get(data.get("session", 0), float("inf")):
            found[incident_key(incident)] = incident
    return sorted(found.values(), key=lambda i: (i.first_step, i.id))


def read_annotations(folder: Path, starts: dict[int, float]) -> list[dict[str, Any]]:
    """Return what rules were told, in order; see `read_incidents` for `starts`."""
    file, found = folder / "annotations.jsonl", []
    for number, data in _lines(file):
        line = sound_annotation(data)
        if line is None:
            _left_out(file, number)
        elif line["after_step"] < starts.get(line.get("session", 0), float("inf")):
            found.append(line)
    return found


def read_summary(folder: Path, checksum: Any) -> str:
    """Return the words said at the end; "" where there are none.

    Args:
        folder: of the run.
        checksum: CRC-32 of the words; None where it is not known that there are any.
    """
    text = _text(folder / "summary.md") or ""
    if is_count(checksum) and zlib.crc32(text.encode()) != checksum:
        warn(f"{folder / 'summary.md'} is not what was written.", stacklevel=3)
    return text.removeprefix("```\n").removesuffix("\n```")


def tell_missing_lines(folder: Path, sessions: Sequence[Mapping[str, Any]]) -> None:
    """Warn where files of lines have fewer of them than were written."""
    for place, name in enumerate(("incidents.jsonl", "annotations.jsonl")):
        counts = [s["lines"][place] for s in sessions if _are_counts(s.get("lines"))]
        expected = sum(counts)
        if expected and (found := (_text(folder / name) or "").count("\n")) < expected:
            warn(f"{folder / name}: {expected - found:,} of {expected:,} lines are missing.", stacklevel=3)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(file)
    if not text:
        return
    # A last line without its end was cut short; the ends of other lines are "\n" and nothing else.
    *lines, cut = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line) if is_sealed_well(line) else None
        except UNREADABLE:
            data = None
        if isinstance(data, dict):
            yield number, data
        elif line.strip():
            _left_out(file, number)
    if cut.strip():
        warn(f"{file}: the last line was cut short and is left out.", stacklevel=4)


def _left_out(file: Path, number: int) -> None:
    warn(f"{file}, line {number} can't be read and is left out.", stacklevel=4)


def _text(file: Path) -> str | None:
    if not file.exists() and not file.is_symlink():
        return None
    try:
        return contents(file).decode("utf-8", errors="replace")
    except (OSError, RunFormatError) as error:
        warn(f"{file} can't be read, and what it holds is missing: {error}", stacklevel=4)
        return None


def _load(file: Path) -> tuple[Any, bool]:
    """Return what stands in a JSON file, and whether it is what was written."""
    try:
        text = contents(file).decode("utf-8")
        return json.loads(text), is_sealed_well(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RunFormatError):
            raise
        raise RunFormatError(f"{file} is not JSON: {error}.") from None
    except OSError as error:
        raise RunFormatError(f"{file} can't be read: {error}.") from None
