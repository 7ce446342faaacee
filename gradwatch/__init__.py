"""See and steer gradients while a PyTorch network trains.

The names below load on first use (PEP 562): importing gradwatch pulls in no trainer and no tensorboard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import doors
from ._version import __version__
from .errors import ConfigError, GradwatchError, GradwatchWarning

if TYPE_CHECKING:
    from ._preflight import PreflightReport as PreflightReport
    from ._preflight import check_lightning as check_lightning
    from ._preflight import preflight as preflight
    from .book import load_rules as load_rules
    from .records import Finding as Finding
    from .records import Histogram as Histogram
    from .records import Incident as Incident
    from .records import Index as Index
    from .records import StepRecord as StepRecord
    from .records import Verdict as Verdict
    from .runs import verdict as verdict
    from .treatments.surgery import Surgery as Surgery
    from .treatments.surgery import split as split
    from .trials import WhatIf as WhatIf
    from .trials import what_if as what_if
    from .watch import RememberedBatches as RememberedBatches
    from .watch import StepOutcome as StepOutcome
    from .watch import Watch as Watch

_DOORS = {
    "Finding": "records",
    "Histogram": "records",
    "Incident": "records",
    "Index": "records",
    "PreflightReport": "_preflight",
    "RememberedBatches": "watch",
    "StepOutcome": "watch",
    "StepRecord": "records",
    "Surgery": "treatments.surgery",
    "Verdict": "records",
    "Watch": "watch",
    "WhatIf": "trials",
    "check_lightning": "_preflight",
    "load_rules": "book",
    "preflight": "_preflight",
    "split": "treatments.surgery",
    "verdict": "runs",
    "what_if": "trials",
}

__all__ = [
    "ConfigError",
    "GradwatchError",
    "GradwatchWarning",
    "__version__",
    "Finding",
    "Histogram",
    "Incident",
    "Index",
    "PreflightReport",
    "RememberedBatches",
    "StepOutcome",
    "StepRecord",
    "Surgery",
    "Watch",
    "WhatIf",
    "check_lightning",
    "load_rules",
    "preflight",
    "split",
    "what_if",
]


__getattr__, __dir__ = doors(__name__, _DOORS, __all__)
