"""Case files, read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from .._warn import warn
from ..errors import RunFormatError
from ..records import CASE_SCHEMA, CaseFile
from ..sinks import CASES
from ..sinks._files import contents
from ..sinks._plain import is_sealed_well
from ._sound import UNREADABLE, is_count

__all__ = ["CaseReader"]


class CaseReader:
    """Reads the case files of a folder; one that has not changed is read once. One that can't be read is told once, and
    left out: its incident stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, tuple[tuple[int, int], CaseFile | None]] = {}

    def read(self) -> list[CaseFile]:
        found = [self._one(path) for path in sorted(self._folder.glob(CASES))]
        return [case for case in found if case is not None]

    def _one(self, path: Path) -> CaseFile | None:
        try:
            stat = path.lstat()
        except OSError:  # superseded just now
            return None
        mark = (stat.st_mtime_ns, stat.st_size)
        if path not in self._known or self._known[path][0] != mark:
            case = _read(path)
            self._known[path] = mark, case if case is None else replace(case, folder=str(self._folder))
        return self._known[path][1]


def _read(path: Path) -> CaseFile | None:
    try:
        text = contents(path).decode("utf-8")
        data = json.loads(text)
        if not is_sealed_well(text):
            raise ValueError("its checksum differs")
        if not is_count(data.get("schema")) or data["schema"] > CASE_SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}; this gradwatch reads up to {CASE_SCHEMA}")
        case = CaseFile.from_json(data)
        if not _is_sound(case):
            raise ValueError("its parts don't fit each other")
    except (OSError, RunFormatError, *UNREADABLE) as error:
        warn(f"{path} can't be read, and is left out: {error}.", stacklevel=6)
        return None
    return case


def _is_sound(case: CaseFile) -> bool:
    texts = [case.rule, case.name, case.worst_path, case.samples_from]
    texts += [case.batch_file, case.born_in, case.phase, case.flight_recorder]
    return (
        all(isinstance(text, str) for text in (*texts, *case.notes, *case.consequences))
        and all(isinstance(sample, (int, str)) for sample in case.sample_ids)
        and all(len(values) == len(case.steps) for values in case.curves.values())
        and isinstance(case.complete, bool)
    )
