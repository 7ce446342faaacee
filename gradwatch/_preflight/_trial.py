"""What the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._report import PreflightFinding
from ._task import Task, float_tensors
from ._trace import Trace

__all__ = ["Check", "NotChecked", "Trial", "weight_shaped"]

Check = Callable[["Trial"], Iterable[PreflightFinding]]


class NotChecked(Exception):  # noqa: N818 (it is no error: a reason)
    """A check could not be made; the text says why."""


@dataclass(eq=False)
class Trial:
    """A task, a pass over it in train mode, and the optimizers that will train it.

    Attributes:
        task: model, batch and loss.
        trace: of a pass at the initial weights.
        lively: of a second pass, in which weights that are all zero were given small random values, as a first step
            would: the branches behind them (LoRA's B, residual branches) can then be told from dead ones.
        eval_loss: of the same batch in eval mode.
        optimizers: () where none was given.
        overfit_steps: how long to train on the batch; 0 for not at all.
        measures: numbers to report.
    """

    task: Task
    trace: Trace
    lively: Trace
    eval_loss: float
    optimizers: Sequence[Optimizer] = ()
    overfit_steps: int = 30
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.task.model

    @property
    def outputs(self) -> Tensor | None:
        return self.trace.outputs

    @cached_property
    def batch_size(self) -> int:
        """Samples in the batch, taken from its first tensor; 0 where it has no dimension."""
        tensors = [t for t in float_tensors(self.task.inputs) if t.dim()] or float_tensors(self.task.batch)
        if tensors and tensors[0].dim():
            return int(tensors[0].shape[0])
        outputs = self.outputs
        return int(outputs.shape[0]) if outputs is not None and outputs.dim() else 0

    @cached_property
    def wanted(self) -> Tensor | None:
        """Targets as floats in the outputs' shape, or None."""
        return None if self.outputs is None or not self.task.can_lab else self.task.like_outputs(self.outputs)

    def requires_lab(self) -> None:
        """Go on only where the loss can be tried on outputs of our own.

        Raises:
            NotChecked: it can't.
        """
        if not self.task.can_lab:
            form = "it is given as loss_fn(model, batch)" if self.task.takes_model else "targets are no tensor"
            why = "the model returns its own loss" if self.task.loss_fn is None else form
            raise NotChecked(f"the loss can't be tried on chosen outputs: {why}")
        if self.wanted is None:
            raise NotChecked("targets and outputs are of sizes that can't be compared")

    @cached_property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.tensor(self.trace.loss)))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that require a gradient, by path."""
        return {path: p for path, p in self.model.named_parameters() if p.requires_grad}


def weight_shaped(parameter: Tensor) -> bool:
    """Biases, scales and shifts are left out of what is said of weights."""
    return parameter.dim() >= 2 and parameter.numel() > 1
