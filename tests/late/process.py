"""A process for the late device alone.

Torch makes its threads for backward once, for the devices known at the first backward of a process, and a process that
knows an accelerator behaves differently in many places. So the device lives in a process of its own, and tests marked
`on_late` run there: their bodies are called by name.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

__all__ = ["on_late"]

_pools: list[ProcessPoolExecutor] = []


def on_late(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test's body in the process that has the late device."""

    @functools.wraps(test)
    def there(**parameters: Any) -> None:
        skipped, failure = _submit(test.__module__, test.__qualname__, parameters)
        if skipped:
            pytest.skip(skipped)
        if failure:
            pytest.fail(failure, pytrace=False)

    return there


def _submit(module: str, name: str, parameters: dict[str, Any]) -> tuple[str, str]:
    if not _pools:
        _pools.append(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin))
    try:
        return _pools[0].submit(_call, module, name, parameters).result()
    except BrokenProcessPool:
        _pools.clear()
        raise


def _begin() -> None:
    from .device import is_there, late

    if is_there():
        late()


def _call(module: str, name: str, parameters: dict[str, Any]) -> tuple[str, str]:
    """Call a test; return why it was skipped, and how it failed."""
    body = getattr(importlib.import_module(module), name).__wrapped__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            body(**parameters)
    except pytest.skip.Exception as skip:
        return str(skip), ""
    except BaseException:
        return "", traceback.format_exc()
    return "", ""
