"""The engine that knows no trainer, and `Watch`, its door for plain loops."""

from ._draft import StepInputs
from ._engine import Engine, StepOutcome
from ._news import IncidentTarget, incident_target
from ._options import MeasureOptions
from ._paths import clean_path, unwrap
from ._scaler import ScaleReader, scale_left_in_gradients
from ._session import Session
from ._settings import Settings, resolve
from ._stepper import Stepper
from ._watch import Watch

__all__ = [
    "Engine",
    "IncidentTarget",
    "MeasureOptions",
    "ScaleReader",
    "Session",
    "Settings",
    "StepInputs",
    "StepOutcome",
    "Stepper",
    "Watch",
    "clean_path",
    "incident_target",
    "resolve",
    "scale_left_in_gradients",
    "unwrap",
]
