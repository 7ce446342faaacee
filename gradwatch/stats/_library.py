"""The compiled library on disk: built once per machine, and trusted only where it is known to be what was built.

A file's name holds the hash of its contents, so that a truncated, flipped or foreign file is found before it is
loaded: the loader itself ends the process on some of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep, time

__all__ = ["NoLibraryError", "is_compiled", "library"]

_SOURCE = Path(__file__).with_name("_native.c")
_FLAGS = (("-O3", "-march=native"), ("-O3",))
_PATIENCE = 30.0
"""Seconds that a training waits for a compiler, or for another process that compiles, once."""
_STALE = 3600.0
_LARGEST = 1 << 24
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NoLibraryError(Exception):
    """There is no library to be had; the message says why."""


def library(*, skip: int = 0) -> ctypes.CDLL:
    """Return the library, loaded; found in the cache or compiled into it, and verified.

    Args:
        skip: how many of the compiler's sets of flags, best first, are not to be used again.

    Raises:
        NoLibraryError: there is no compiler, no place to keep its work, or either fails.
        OSError: what was compiled can't be loaded.
    """
    if os.name != "posix":
        raise NoLibraryError("compiled kernels are for POSIX systems")
    compiler = _compiler()
    folder = _folder()
    deadline = monotonic() + _PATIENCE
    reason = "no set of compiler flags is left"
    for flags in _FLAGS[skip:]:
        key = _key(compiler, flags)
        if found := _known_good(folder, key):
            return _loaded(*found)
        with _alone(folder, deadline):
            # Another process may have been at it, too.
            if found := _known_good(folder, key):
                return _loaded(*found)
            try:
                found = _built(folder, key, [compiler, *flags], deadline)
            except _CompileError as error:
                reason = str(error)
                continue
        return _loaded(*found)
    raise NoLibraryError(reason)


def is_compiled() -> bool:
    """Return whether `library` would find what it needs and start no compiler. Never raises."""
    try:
        compiler = _compiler()
        return os.name == "posix" and any(_known_good(_folder(), _key(compiler, flags)) for flags in _FLAGS)
    except (NoLibraryError, OSError):
        return False


def _compiler() -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoLibraryError("no C compiler (cc, gcc, clang) on PATH")
    return compiler


class _CompileError(Exception):
    """The compiler did not do it with these flags; others may work."""


def _folder() -> Path:
    """Return our own folder in the user's cache, where nobody else can write.

    Raises:
        NoLibraryError: there is none, nor can it be made.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base or Path.home() / ".cache") / "gradwatch"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid == os.geteuid() and status.st_mode & _OTHERS_WRITE:
            folder.chmod(0o700)
            status = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: neither HOME nor a passwd entry
        raise NoLibraryError(f"no cache folder for the compiled library: {_short(error)}") from error
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise NoLibraryError(f"the cache folder {folder} belongs to, or can be written by, others")
    return folder


def _key(compiler: str, flags: Sequence[str]) -> str:
    described = "\0".join([compiler, *flags, platform.machine(), _processor(), _SOURCE.read_text(encoding="utf-8")])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what tells machines apart that share a home folder but not an instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.version()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _loaded(file: Path, contents: bytes) -> ctypes.CDLL:
    """Load the bytes that were verified, from memory where the system can: a file may change under who has it mapped,
    which ends the process."""
    try:
        handle = os.memfd_create("gradwatch", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        return ctypes.CDLL(str(file))
    try:
        with os.fdopen(os.dup(handle), "wb") as writer:
            writer.write(contents)
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        return ctypes.CDLL(str(file))
    finally:
        os.close(handle)


def _known_good(folder: Path, key: str) -> tuple[Path, bytes] | None:
    """Return the file of this key whose contents are what its name says, and them; others of its name are removed."""
    try:
        files = sorted(folder.glob(f"native-{key}-*.so"))
    except OSError as error:
        raise NoLibraryError(f"the cache folder can't be read: {_short(error)}") from error
    for file in files:
        if contents := _verified(file):
            return file, contents
        # A directory stays: who made it knows what is in it.
        with contextlib.suppress(OSError):
            file.unlink()
    return None


def _verified(file: Path) -> bytes | None:
    """Return the contents of a regular file of ours, which only we can write, and whose name holds their hash."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as opened:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return None
            if status.st_mode & _OTHERS_WRITE or not 0 < status.st_size <= _LARGEST:
                return None
            contents = opened.read()
    except OSError:
        return None
    return contents if file.stem.rpartition("-")[2] == _digest(contents) else None


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:32]


@contextlib.contextmanager
def _alone(folder: Path, deadline: float) -> Iterator[None]:
    """Let one process at a time compile, where the file system can say who; the end of a process frees the others."""
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoLibraryError(f"the cache folder can't be opened: {_short(error)}") from error
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > deadline:
                    raise NoLibraryError(f"another process has been compiling for {_PATIENCE:.0f} s") from None
                sleep(0.05)
            except OSError:  # a file system without locks: then several may compile, and the last one's file stays
                break
        yield
    finally:
        os.close(handle)


def _built(folder: Path, key: str, command: list[str], deadline: float) -> tuple[Path, bytes]:
    """Compile, write to the disk, and give it its name in one go."""
    try:
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder, ignore_cleanup_errors=True) as scratch:
            built = Path(scratch) / "native.so"
            _compile(command, built, deadline)
            contents = built.read_bytes()
            if not contents:
                raise _CompileError(f"{command[0]} wrote an empty library")
            target = folder / f"native-{key}-{_digest(contents)}.so"
            built.chmod(0o700)
            with built.open("rb") as opened:
                os.fsync(opened.fileno())
            built.replace(target)
    except OSError as error:
        raise NoLibraryError(f"the compiled library can't be kept: {_short(error)}") from error
    if _verified(target) is None:
        raise NoLibraryError(f"{target} is not what was written to it")
    return target, contents


def _compile(command: list[str], built: Path, deadline: float) -> None:
    log = built.with_name("log")
    full = [*command, "-shared", "-fPIC", str(_SOURCE), "-o", str(built), "-lm"]
    # The compiler's own temporary files go where they are removed with ours, and where we know that one can write.
    env = {**os.environ, "TMPDIR": str(built.parent)}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            full, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=env, start_new_session=True
        )
        try:
            code = process.wait(max(deadline - monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            raise NoLibraryError(f"{command[0]} did not finish within {_PATIENCE:.0f} s") from None
        finally:
            _end(process)
    if code or not built.is_file():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise _CompileError(f"{command[0]} failed ({code}){': ' + said[-1][:160] if said else ''}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a compiler with all that it started; nothing happens where it is done."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed while it compiled has left."""
    for scratch in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time() - scratch.stat().st_mtime > _STALE:
                shutil.rmtree(scratch, ignore_errors=True)


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
