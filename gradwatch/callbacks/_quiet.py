"""A training step once more, without a word to the loggers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__all__ = ["run_quietly"]

_ABSENT = object()


def run_quietly(module: Any, batch: Any, batch_idx: int, context: AbstractContextManager[Any]) -> Any:
    """Return what `module.training_step` returns, with its `log` and `log_dict` switched off meanwhile.

    Args:
        context: the Trainer's around a step: autocast.
    """
    before = {name: vars(module).get(name, _ABSENT) for name in ("log", "log_dict")}
    for name in before:
        vars(module)[name] = lambda *args, **kwargs: None
    try:
        with context:
            return module.training_step(batch, batch_idx)
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                del vars(module)[name]
            else:
                vars(module)[name] = value
