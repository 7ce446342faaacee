"""What a trainer's loop hands over at a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["StepInputs"]


@dataclass
class StepInputs:
    """What a trainer knows of the step.

    Attributes:
        step: optimizer steps taken before this one.
        epoch, batch_idx: as the trainer counts; -1 where it does not.
        losses: of the micro-batches, unscaled and not divided by their number; empty where unknown.
        batch, outputs, targets: of the last micro-batch, for rules that need them; or, as `batch`, the `Forward` that
            is kept of all three.
        num_samples: in all micro-batches; 0: taken from `batch`.
        grad_scale: what `.grad` is still multiplied by.
        scaler: whether a loss scaler watches over this step (an overflow is then no fault).
        scale: the loss scaler's scale, for the record.
        optimizer: which optimizer steps, where several step each on its own; None for all together.
        scalars: anything else to put on record.
        has_backward: whether a backward ran since the last step; None where that is not known.
        clipper: what the trainer is known to do to gradients between this look and the optimizer's step, in words; the
            same on all ranks.
        scale_left: returns what `.grad` of an optimizer is multiplied by, asked in its step; None: nothing.
    """

    step: int
    epoch: int = -1
    batch_idx: int = -1
    losses: Sequence[Any] = ()
    batch: Any = None
    outputs: Any = None
    targets: Any = None
    num_samples: int = 0
    grad_scale: float | Tensor = 1.0
    scaler: bool = False
    scale: float | None = None
    optimizer: int | None = None
    scalars: dict[str, float] = field(default_factory=dict)
    has_backward: bool | None = None
    clipper: str = ""
    scale_left: Callable[[Optimizer], float | Tensor] | None = None
