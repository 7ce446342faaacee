"""Sinks: where records go. Each knows records and one writer, and nothing of models or rules.

`RunFolder` keeps every record on disk, `MemorySink` in memory, `TensorBoardSink` and the others feed a logger.
`SafeSinks` holds several and sees to it that none of them harms the training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import doors
from ._case_names import CASES, batch_name, case_name
from ._csv import CsvSink
from ._duck import DuckSink
from ._headline import SCALARS
from ._incident_lines import IncidentKey, incident_key
from ._loggers import sinks_for_loggers
from ._memory import MemorySink
from ._mlflow import MlflowSink
from ._notify import NotifySink
from ._run_folder import RUN_FORMAT, RunFolder
from ._safe import SafeSinks
from ._trackio import TrackioSink
from ._wandb import WandbSink

if TYPE_CHECKING:
    from .tensorboard import TensorBoardSink

__all__ = [
    "CASES",
    "RUN_FORMAT",
    "SCALARS",
    "CsvSink",
    "DuckSink",
    "IncidentKey",
    "MemorySink",
    "MlflowSink",
    "NotifySink",
    "RunFolder",
    "SafeSinks",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "batch_name",
    "case_name",
    "incident_key",
    "sinks_for_loggers",
]


# tensorboard takes half a second to import, and need not be installed.
__getattr__, __dir__ = doors(__name__, {"TensorBoardSink": "tensorboard"}, __all__)
