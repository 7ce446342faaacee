"""Treatments: what changes gradients between backward and the optimizer step, and actions, which ask of the trainer.

Each is a small class over a plain kernel (`clip_by_global_norm_(grads, max_norm) -> norm`, ...), usable on every step
or behind a rule. The names load on first use (PEP 562).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from ..errors import suggest

_TREATMENTS = {
    "ClipByGlobalNorm": "_clip",
    "ClipByNorm": "_clip",
    "ClipByValue": "_clip",
    "ClipToLimit": "_clip",
    "MicroBatchSurgery": "surgery",
    "Normalize": "_scale",
    "Scale": "_scale",
    "SkipParameter": "_skip",
    "SkipStep": "_skip",
    "Surgery": "surgery",
    "ZClip": "_zclip",
}
_ACTIONS = {
    "Checkpoint": "_actions",
    "LowerLearningRate": "_actions",
    "Notify": "_actions",
    "Stop": "_actions",
}
_OTHERS = {
    "BaseAction": "_actions",
    "BaseTreatment": "_base",
    "BufferKeeper": "_buffers",
    "GradOutputHandle": "_grad_output",
    "LearningRates": "_learning_rate",
    "at_grad_output": "_grad_output",
    "clip_by_global_norm_": "_clip",
    "clip_by_norm_": "_clip",
    "clip_by_value_": "_clip",
    "norm_coefficient": "_clip",
    "normalize_": "_scale",
    "scale_": "_scale",
    "send": "_notify",
    "sort_treatments": "_base",
    "zclip": "_zclip",
    "zclip_memory": "_zclip",
}
_DOORS = {**_TREATMENTS, **_ACTIONS, **_OTHERS}

__all__ = ["ACTIONS", "TREATMENTS", *sorted(_DOORS)]


class _Names(Mapping[str, type]):
    """Class by its name in snake case, loaded when asked for."""

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._classes = {_snake(name): name for name in classes}

    def __getitem__(self, name: str) -> type:
        return __getattr__(self._classes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


def _snake(name: str) -> str:
    # The same as BaseTreatment.name: "ZClip" is "zclip".
    return "".join("_" + c if i and c.isupper() and name[i - 1].islower() else c for i, c in enumerate(name)).lower()


TREATMENTS = _Names(_TREATMENTS)
"""Treatments by the name they have in rules files."""
ACTIONS = _Names(_ACTIONS)
"""Actions by the name they have in rules files."""


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {suggest(name, __all__)}")
    value = getattr(import_module("." + _DOORS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
