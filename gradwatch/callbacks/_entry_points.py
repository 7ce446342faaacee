"""Callback factories: with `GRADWATCH=1` in the environment a script is watched without a changed line.

Lightning's packages each read an entry-point group of their own when a Trainer or a Fabric is made.
`GRADWATCH_RULES` names a preset or a rules file; "default" where it is not set.
"""

from __future__ import annotations

import atexit
import os
from importlib import import_module
from typing import Any

__all__ = ["fabric", "lightning", "lightning_fabric", "pytorch_lightning"]


def lightning() -> list[Any]:
    """Return the callbacks for `lightning.pytorch.Trainer`."""
    return _trainer_callbacks("lightning.pytorch.callbacks")


def pytorch_lightning() -> list[Any]:
    """Return the callbacks for `pytorch_lightning.Trainer`."""
    return _trainer_callbacks("pytorch_lightning.callbacks")


def fabric() -> list[Any]:
    """Return the callbacks for `lightning.fabric.Fabric`."""
    return _fabric_callbacks()


def lightning_fabric() -> list[Any]:
    """Return the callbacks for `lightning_fabric.Fabric`."""
    return _fabric_callbacks()


def _is_on() -> bool:
    return os.environ.get("GRADWATCH", "") == "1"


def _rules() -> str:
    return os.environ.get("GRADWATCH_RULES") or "default"


def _trainer_callbacks(package: str) -> list[Any]:
    # Called by every Trainer of every program in the environment: nothing is imported before this line.
    if not _is_on():
        return []
    from ._from_environment import trainer_callback

    return [trainer_callback(import_module(package).Callback, _rules())]


def _fabric_callbacks() -> list[Any]:
    if not _is_on():
        return []
    from .fabric import GradWatch

    watch = GradWatch(_rules())
    # The script does not know of it: nobody else closes it.
    atexit.register(watch.close)
    return [watch]
