"""Treatments: what changes gradients between backward and the optimizer step, and actions, which ask of the trainer.

Each is a small class over a plain kernel (`clip_by_global_norm_(grads, max_norm) -> norm`, ...), usable on every step
or behind a rule. The names load on first use (PEP 562).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .._lazy import doors
from ..protocols import name_of_class

if TYPE_CHECKING:
    from ._actions import BaseAction as BaseAction
    from ._actions import Checkpoint as Checkpoint
    from ._actions import LowerLearningRate as LowerLearningRate
    from ._actions import Notify as Notify
    from ._actions import Stop as Stop
    from ._adaptive import AdaptiveClip as AdaptiveClip
    from ._adaptive import adaptive_clip_ as adaptive_clip_
    from ._base import BaseTreatment as BaseTreatment
    from ._base import sort_treatments as sort_treatments
    from ._buffers import BufferKeeper as BufferKeeper
    from ._centralize import Centralize as Centralize
    from ._centralize import centralize_ as centralize_
    from ._clip import ClipByGlobalNorm as ClipByGlobalNorm
    from ._clip import ClipByNorm as ClipByNorm
    from ._clip import ClipByValue as ClipByValue
    from ._clip import ClipToLimit as ClipToLimit
    from ._clip import clip_by_global_norm_ as clip_by_global_norm_
    from ._clip import clip_by_norm_ as clip_by_norm_
    from ._clip import clip_by_value_ as clip_by_value_
    from ._clip import norm_coefficient as norm_coefficient
    from ._ema import EmaClip as EmaClip
    from ._ema import ema_clip as ema_clip
    from ._grad_output import GradOutputHandle as GradOutputHandle
    from ._grad_output import at_grad_output as at_grad_output
    from ._learning_rate import LearningRates as LearningRates
    from ._moments import ResetMoments as ResetMoments
    from ._moments import reset_moments_ as reset_moments_
    from ._noise import Noise as Noise
    from ._noise import add_noise_ as add_noise_
    from ._notify import resolve_target as resolve_target
    from ._notify import send as send
    from ._qk_clip import QKClip as QKClip
    from ._quantile import QuantileClip as QuantileClip
    from ._quantile import quantile_limit as quantile_limit
    from ._rollback import Rollback as Rollback
    from ._sanitize import Sanitize as Sanitize
    from ._sanitize import sanitize_ as sanitize_
    from ._scale import Normalize as Normalize
    from ._scale import Scale as Scale
    from ._scale import normalize_ as normalize_
    from ._scale import scale_ as scale_
    from ._skip import SkipParameter as SkipParameter
    from ._skip import SkipStep as SkipStep
    from ._spike import SpikeClip as SpikeClip
    from ._spike import spike_clip_ as spike_clip_
    from ._units import UnitLayout as UnitLayout
    from ._zclip import ZClip as ZClip
    from ._zclip import zclip as zclip
    from ._zclip import zclip_memory as zclip_memory
    from .surgery import MicroBatchSurgery as MicroBatchSurgery
    from .surgery import Surgery as Surgery

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
    "QKClip": "_qk_clip",
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
    "Rollback": "_rollback",
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

__all__ = [
    "ACTIONS",
    "TREATMENTS",
    "AdaptiveClip",
    "BaseAction",
    "BaseTreatment",
    "BufferKeeper",
    "Centralize",
    "Checkpoint",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipToLimit",
    "EmaClip",
    "GradOutputHandle",
    "LearningRates",
    "LowerLearningRate",
    "MicroBatchSurgery",
    "Noise",
    "Normalize",
    "Notify",
    "QKClip",
    "QuantileClip",
    "Rollback",
    "ResetMoments",
    "Sanitize",
    "Scale",
    "SkipParameter",
    "SkipStep",
    "SpikeClip",
    "Stop",
    "Surgery",
    "UnitLayout",
    "ZClip",
    "adaptive_clip_",
    "add_noise_",
    "at_grad_output",
    "centralize_",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "ema_clip",
    "norm_coefficient",
    "normalize_",
    "quantile_limit",
    "reset_moments_",
    "resolve_target",
    "sanitize_",
    "scale_",
    "send",
    "sort_treatments",
    "spike_clip_",
    "zclip",
    "zclip_memory",
]


class _Names(Mapping[str, "type[Any]"]):
    """Class by its name in snake case, loaded when asked for."""

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._classes = {name_of_class(name): name for name in classes}

    def __getitem__(self, name: str) -> type:
        return __getattr__(self._classes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


TREATMENTS = _Names(_TREATMENTS)
"""Treatments by the name they have in rules files."""
ACTIONS = _Names(_ACTIONS)
"""Actions by the name they have in rules files."""


__getattr__, __dir__ = doors(__name__, _DOORS, __all__)
