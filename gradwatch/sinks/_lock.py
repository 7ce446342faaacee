"""One writer per folder."""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from time import sleep, time
from typing import Any

from ..errors import ConfigError, RunFormatError
from ._files import contents, open_own, write_all

__all__ = ["FolderLock", "is_being_written"]

BEAT_SECONDS = 3.0
"""An owner touches its lock so often; who can't see its process waits for that."""
SILENT_SECONDS = 60.0
PROC = Path("/proc")

_held: dict[Path, FolderLock] = {}


class FolderLock:
    """Holds a folder for one writer until released, or until the process ends, however it ends.

    The lock is a file that names its owner: process, when that began, host, and which folder it stands for. Who finds
    it asks whether that process still lives; on another host, whether it still touches the file. Nothing that a copy
    of the folder, a forked child or a restarted machine does frees it or holds it. (The system's own record locks are
    lost as soon as the process closes any other descriptor of the file, as copying a folder does.)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._token = ""
        self._pid = -1

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()

    @property
    def path(self) -> Path:
        return self.folder / ".lock"

    def acquire(self) -> None:
        """Raises:
        ConfigError: another writer has the folder.
        RunFormatError: the lock is a link.
        """
        if self.folder in _held and _held[self.folder]._pid == os.getpid():
            raise self._taken("this process")
        token = secrets.token_hex(8)
        mine = {**_myself(), "folder": self.folder.stat().st_ino, "token": token}
        for _ in range(8):
            if self._create(json.dumps(mine).encode(), token):
                self._token, self._pid = token, os.getpid()
                _held[self.folder] = self
                return
            self._take_away()
        raise self._taken("several others at once")

    def beat(self) -> None:
        """Show that the owner lives."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Let go. Does nothing in a forked child."""
        if not self._token or self._pid != os.getpid():
            return
        # The file goes first: what Ctrl-C stops on the way is done again by the next call.
        with suppress(OSError, RunFormatError):
            if _owner(self.path).get("token") == self._token:
                self.path.unlink()
        _held.pop(self.folder, None)
        self._token = ""

    def _create(self, data: bytes, token: str) -> bool:
        """Make the lock, whole at once; return whether there was none."""
        temporary = self.folder / f".lock.{token}"
        file = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                write_all(file, data)
            finally:
                os.close(file)
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if self.path.exists():
                    return False
                temporary.replace(self.path)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _take_away(self) -> None:
        """Remove the lock of an owner that is no more.

        Raises:
            ConfigError: it lives.
        """
        try:
            owner = _owner(self.path)
        except FileNotFoundError:
            return
        if _lives(owner, self.path, self.folder, patient=True):
            raise self._taken(f"process {owner.get('pid', 'unknown')}{_where(owner)}")
        stale = self.folder / f".lock.{secrets.token_hex(8)}"
        try:
            self.path.rename(stale)
        except FileNotFoundError:
            return
        if _owner(stale) != owner:  # somebody else was quicker, and this is theirs
            with suppress(OSError):
                os.link(stale, self.path)
        stale.unlink(missing_ok=True)

    def _taken(self, owner: str) -> ConfigError:
        return ConfigError(
            f"the run folder {str(self.folder)!r} is being written by {owner}. "
            "Give each run, and each GradWatch in a run, a folder of its own (`run_dir=` or `name=`)."
        )


def is_being_written(folder: Path) -> bool:
    """Return whether a writer that lives holds the folder."""
    path = folder / ".lock"
    try:
        return _lives(_owner(path), path, folder, patient=False)
    except (OSError, RunFormatError):
        return False


def _owner(path: Path) -> dict[str, Any]:
    text = contents(path).decode(errors="replace").strip()
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):
        owner = None
    if isinstance(owner, dict):
        return owner
    return {"pid": owner} if isinstance(owner, int) else {}  # older ones hold the bare number


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "start": _start(pid), "host": _host()}


def _host() -> str:
    """Return what tells machines, their starts and containers apart: within one of them process ids mean something."""
    parts = [socket.gethostname()]
    for name in ("sys/kernel/random/boot_id", "self/ns/pid"):
        with suppress(OSError):
            path = PROC / name
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return "/".join(parts)


def _start(pid: int) -> str:
    """Return when a process began, in the system's own ticks; "" where there is none, or it can't be told."""
    try:
        # The name, in brackets, may hold anything.
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(owner: dict[str, Any], path: Path, folder: Path, *, patient: bool) -> bool:
    pid, start = owner.get("pid"), owner.get("start")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    if owner.get("folder", folder.stat().st_ino) != folder.stat().st_ino:
        return False  # it came with a copy of its folder
    if owner.get("host", _host()) == _host():
        if _start(os.getpid()):
            return _start(pid) == (start or _start(pid)) != ""
        if os.name == "posix":
            return _answers(pid)
    return _beats(path, patient=patient)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _beats(path: Path, *, patient: bool) -> bool:
    """Return whether somebody touches the file, whom one can't see."""
    seen = path.stat().st_mtime
    if time() - seen > SILENT_SECONDS:
        return False
    if not patient:
        return True
    until = time() + 2.5 * BEAT_SECONDS
    while time() < until:
        sleep(0.2)
        if path.stat().st_mtime != seen:
            return True
    return False


def _where(owner: dict[str, Any]) -> str:
    host = str(owner.get("host", "")).partition("/")[0]
    return f" on {host}" if host and host != socket.gethostname() else ""
