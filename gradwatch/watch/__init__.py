"""The engine that knows no trainer, and `Watch`, its door for plain loops."""

from ._batch import look, validation_inputs
from ._clean import CLEAN
from ._deepspeed import BeforeStep, describe_engine
from ._ending import Ending
from ._engine import Engine, StepOutcome
from ._forget_step import forget_step
from ._guard import Guard
from ._incident_target import IncidentTarget, incident_target
from ._inventory import Inventory
from ._loaders import RememberedBatches
from ._options import MeasureOptions
from ._paths import unwrap
from ._prediction import Forward
from ._produced import Look, look_at
from ._replays import ForwardMemory
from ._requests import Home
from ._run_dir import RunDir, checked_run_dir, free_run_dir, run_dir_of
from ._scaler import ScaleReader, scale_left_in_gradients
from ._session import Session
from ._settings import Settings, resolve
from ._step_inputs import StepInputs
from ._stepper import Stepper, raw_optimizer
from ._summary import summarize
from ._tasks import Tasks, tasks_of
from ._undo import Undo
from ._validation import validation_name, validation_scalars
from ._watch import Watch
from ._what_ifs import WhatIfs

__all__ = [
    "CLEAN",
    "BeforeStep",
    "Ending",
    "Engine",
    "Forward",
    "ForwardMemory",
    "Guard",
    "Home",
    "IncidentTarget",
    "Inventory",
    "Look",
    "MeasureOptions",
    "RememberedBatches",
    "RunDir",
    "ScaleReader",
    "Session",
    "Settings",
    "StepInputs",
    "StepOutcome",
    "Stepper",
    "Tasks",
    "Undo",
    "Watch",
    "WhatIfs",
    "checked_run_dir",
    "describe_engine",
    "forget_step",
    "free_run_dir",
    "incident_target",
    "look",
    "look_at",
    "raw_optimizer",
    "resolve",
    "run_dir_of",
    "scale_left_in_gradients",
    "summarize",
    "tasks_of",
    "unwrap",
    "validation_inputs",
    "validation_name",
    "validation_scalars",
]
