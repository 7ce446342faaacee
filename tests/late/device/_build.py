"""Compiles the device once per torch, and keeps the result in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["COMPILER_FAILURE", "has_compiler", "is_there", "load"]

_SOURCE = Path(__file__).with_name("late.cpp")
COMPILER_FAILURE: list[str] = []


def is_there() -> bool:
    """Return whether the device can be had here; `COMPILER_FAILURE` says why not."""
    return load() is not None


def has_compiler() -> bool:
    """Return whether there is a compiler that may make it; compiles nothing."""
    return _compiler() is not None


def _compiler() -> str | None:
    if sys.platform != "linux":
        return None
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@cache
def load() -> ModuleType | None:
    """Return the compiled module, None where no compiler makes one."""
    compiler = _compiler()
    if compiler is None:
        COMPILER_FAILURE.append("no C++ compiler was found")
        return None
    try:
        library = _built(compiler)
        spec = importlib.util.spec_from_file_location("_late", library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        COMPILER_FAILURE.append(f"{type(error).__name__}: {error} {getattr(error, 'stderr', '')}")
        return None
    return module


def _built(compiler: str) -> Path:
    described = "\0".join([compiler, torch.__version__, sys.version, _SOURCE.read_text()])
    name = f"late-{hashlib.sha256(described.encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradwatch-tests"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / name
            subprocess.run(_command(compiler, built), check=True, capture_output=True, text=True, timeout=280)
            built.replace(target)  # in one go: another worker may be at it too
    return target


def _command(compiler: str, built: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=_late"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    links = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{libraries}"]
    return [compiler, *flags, abi, *includes, str(_SOURCE), "-o", str(built), *links]
