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
    "AdaptiveClip": "_adaptive",
    "Centralize": "_centralize",
    "ClipByGlobalNorm": "_clip",
    "ClipByNorm": "_clip",
    "ClipByValue": "_clip",
    "ClipToLimit": "_clip",
    "EmaClip": "_ema",
    "MicroBatchSurgery": "surgery",
    "Noise": "_noise",
    "Normalize": "_scale",
    "QuantileClip": "_quantile",
    "ResetMoments": "_moments",
    "Sanitize": "_sanitize",
    "Scale": "_scale",
    "SkipParameter": "_skip",
    "SkipStep": "_skip",
    "SpikeClip": "_spike",
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
    "UnitLayout": "_units",
    "adaptive_clip_": "_adaptive",
    "add_noise_": "_noise",
    "at_grad_output": "_grad_output",
    "centralize_": "_centralize",
    "clip_by_global_norm_": "_clip",
    "clip_by_norm_": "_clip",
    "clip_by_value_": "_clip",
    "ema_clip": "_ema",
    "norm_coefficient": "_clip",
    "normalize_": "_scale",
    "quantile_limit": "_quantile",
    "resolve_target": "_notify",
    "reset_moments_": "_moments",
    "sanitize_": "_sanitize",
    "scale_": "_scale",
    "send": "_notify",
    "sort_treatments": "_base",
    "spike_clip_": "_spike",
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
