"""Sinks: where records go. Each knows records and one writer, and nothing of models or rules.

`RunFolder` keeps every record on disk, `MemorySink` in memory, `TensorBoardSink` and the others feed a logger.
`SafeSinks` holds several and sees to it that none of them harms the training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._incident_lines import IncidentKey, incident_key
from ._memory import MemorySink
from ._run_folder import RUN_FORMAT, RunFolder
from ._safe import SafeSinks

if TYPE_CHECKING:
    from .tensorboard import TensorBoardSink

__all__ = ["RUN_FORMAT", "IncidentKey", "MemorySink", "RunFolder", "SafeSinks", "TensorBoardSink", "incident_key"]


def __getattr__(name: str) -> Any:
    # tensorboard takes half a second to import, and need not be installed.
    if name == "TensorBoardSink":
        from .tensorboard import TensorBoardSink

        return TensorBoardSink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
