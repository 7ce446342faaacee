"""What a Hugging Face run is made of: its loggers as sinks, its cadence, its state in JSON."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._places import anchored
from ..protocols import Sink
from ..sinks import sinks_for_loggers

__all__ = ["BatchNumber", "logging_steps", "packed", "sinks_of", "unpacked"]


class BatchNumber:
    """Which micro-batch of its epoch goes on, counted by the Trainer's events: it tells none of them.

    Attributes:
        now: its number from 0 on; -1 where it is not known.
    """

    def __init__(self) -> None:
        self.now = -1

    def begin_epoch(self, args: Any, state: Any, loader: Any) -> None:
        """Count from the epoch's beginning, or from where a checkpoint goes on within it."""
        done = float(state.epoch or 0.0) % 1.0
        if not done or args.ignore_data_skip:
            self.now = 0
            return
        try:
            self.now = round(done * len(loader))
        except TypeError:  # nobody knows how long an epoch is
            self.now = -1

    def over(self) -> None:
        """Say that a micro-batch is over."""
        self.now += self.now >= 0


def logging_steps(args: Any, state: Any) -> int:
    """Return the Trainer's steps between two log entries."""
    # Below 1 it is a share of the run; TrainerState holds the steps that came of it.
    return max(1, int(getattr(state, "logging_steps", None) or args.logging_steps))


def sinks_of(args: Any, name: str) -> list[Sink]:
    """Return sinks beside the integrations that `report_to` names; those have begun their runs by now."""
    loggers: list[Any] = []
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs"
        loggers.append(SummaryWriter(str(anchored(folder) / name)))
    if "wandb" in args.report_to:
        import wandb

        loggers += [wandb.run] if wandb.run is not None else []
    if "trackio" in args.report_to:
        import trackio

        loggers.append(trackio)
    sinks = sinks_for_loggers(loggers, name=name)
    if "mlflow" in args.report_to:
        import mlflow

        from ..sinks import MlflowSink

        run = mlflow.active_run()
        if run is not None:
            sinks.append(MlflowSink(mlflow.MlflowClient(), run.info.run_id, name=name))
    return sinks


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state as JSON can hold it, in the form that the Trainer keeps callbacks' states in."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return {"args": {}, "attributes": {"state": base64.b64encode(buffer.getvalue()).decode()}}


def unpacked(saved: Any) -> Any:
    """Return the state that `packed` was given; None where the checkpoint holds something else."""
    try:
        text = saved["attributes"]["state"]
        return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    except Exception:  # the session says that it is none of ours
        return None
