"""The `Callback` class of whichever Lightning packages are there."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import GradwatchError

__all__ = ["callback_bases"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type[Any], ...]:
    """Return the `Callback` of every Lightning package that is imported already, else of the first one installed.

    `lightning` and `pytorch_lightning` are one code base under two names; a program may hold either, or both.

    Raises:
        GradwatchError: neither is installed.
    """
    imported = [name for name in _PACKAGES if f"{name}.callbacks" in sys.modules]
    if not imported:
        imported = [name for name in _PACKAGES if find_spec(name.partition(".")[0]) is not None][:1]
    if not imported:
        raise GradwatchError(
            "GradWatch needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed: "
            "pip install 'gradwatch[lightning]'. A plain loop needs neither: see gradwatch.Watch."
        )
    return tuple(import_module(f"{name}.callbacks").Callback for name in imported)
