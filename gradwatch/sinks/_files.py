"""The files of a run folder: opened as themselves, never as what they point to."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from pathlib import Path

from ..errors import RunFormatError

__all__ = ["append_to", "contents", "open_own", "own_files", "refuse_links", "replace_whole"]

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
FLAGS = NO_FOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# A pipe of that name must not keep anybody waiting.
NO_WAIT = getattr(os, "O_NONBLOCK", 0)

_COUNT = itertools.count()

OURS = (
    "meta.json*",
    ".lock*",
    "index-*",
    "incidents.jsonl",
    "annotations.jsonl",
    "records-*",
    "journal-*",
    "summary.md",
    "case-*",
    "batch-*",
    "flight-*",
)


def open_own(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file.

    Raises:
        RunFormatError: it is a link, a pipe, a device: nothing in a run folder may stand for something elsewhere.
        OSError: as `os.open`.
    """
    try:
        file = os.open(path, flags | FLAGS | NO_WAIT, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO) or path.is_symlink():
            raise _refused(path) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _refused(path)
    return file


def contents(path: Path, start: int = 0) -> bytes:
    """Return what is in a file, from a place on; errors as `open_own`."""
    file = open_own(path, os.O_RDONLY)
    with os.fdopen(file, "rb") as stream:
        stream.seek(start)
        return stream.read()


def append_to(path: Path, data: bytes) -> None:
    """Append to a file; after an error it is as it was before. Errors as `open_own`."""
    file = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        before = os.fstat(file).st_size
        try:
            write_all(file, data)
        except BaseException:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Write all of it: a disk that is about to be full takes a part."""
    written = os.write(file, data)
    while written < len(data):
        written += os.write(file, memoryview(data)[written:])


def replace_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Put a file in the place of another of its name: readers see the one or the other. Errors as `open_own`."""
    if path.is_symlink():
        raise _refused(path)
    # A signal may come while this very file is written.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_COUNT)}.tmp")
    temporary.unlink(missing_ok=True)
    file = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            write_all(file, data)
            if sync:
                os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def own_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are the recorder's, by their names."""
    return sorted({path for pattern in OURS for path in folder.glob(pattern)})


def refuse_links(folder: Path) -> None:
    """Raises:
    RunFormatError: a file of the recorder's stands for something elsewhere.
    """
    for path in own_files(folder):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _refused(path)


def _refused(path: Path) -> RunFormatError:
    kind = "a symbolic link" if path.is_symlink() else "no regular file"
    return RunFormatError(
        f"{path} is {kind}: what belongs to a run folder lies in it. Remove it, or use another folder."
    )
