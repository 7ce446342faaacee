"""What sinks are told of a run when it begins."""

from __future__ import annotations

from pathlib import Path
from time import time

import torch
from torch import nn

from .._version import __version__
from ..protocols import RunMeta
from ..records import own_columns
from ._ranks import world_size
from ._settings import Settings

__all__ = ["run_meta"]


def run_meta(settings: Settings, model: nn.Module, run_dir: Path | None, start_step: int) -> RunMeta:
    """Return a run's name, options, versions and beginning."""
    options = {k: getattr(settings.options, k) for k in settings.options.__dataclass_fields__}
    options["rules"] = [rule.name for rule in settings.book.rules]
    options["treatments"] = [t.name for t in settings.treatments]
    options["statistics"] = [statistic.name for statistic in settings.statistics]
    options["columns"] = [column.to_json() for column in own_columns()]
    options["world_size"] = world_size()
    return RunMeta(
        name=settings.name,
        run_dir=None if run_dir is None else str(run_dir),
        started=time(),
        options=options,
        versions={"gradwatch": __version__, "torch": torch.__version__},
        model=type(model).__name__,
        start_step=start_step,
    )
