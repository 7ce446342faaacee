"""What a program is: a learning problem, made twice, with its fault and with the published fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from ._data import Data
from ._losses import Loss, Metric

__all__ = ["MakeOptimizer", "Problem", "Program", "adam", "control", "rmsprop", "sgd"]

MakeOptimizer = Callable[[nn.Module], Optimizer]


def _optimizer(kind: type[Optimizer], **settings: Any) -> MakeOptimizer:
    return lambda model: kind(model.parameters(), **settings)


def sgd(lr: float, **settings: Any) -> MakeOptimizer:
    return _optimizer(SGD, lr=lr, **settings)


def adam(lr: float, **settings: Any) -> MakeOptimizer:
    return _optimizer(Adam, lr=lr, **settings)


def rmsprop(lr: float) -> MakeOptimizer:
    return _optimizer(RMSprop, lr=lr)


@dataclass(frozen=True, eq=False)
class Problem:
    """All that a training loop needs.

    Attributes:
        model: with its initial values.
        data: inputs and targets for training, inputs and targets for validation.
        loss: of predictions and targets.
        optimizer: made from the model.
        batch_size: a whole data set that is smaller makes one batch.
        steps: optimizer steps.
        metric: of validation predictions and targets; more is better.
        zero_grad: gradients are reset after each step.
        schedule: of the learning rate, made from the optimizer; stepped after each optimizer step.
        accumulate: micro-batches to one optimizer step.
        batches: the examples of a step, from the step and a random state; the default is a new order each epoch.
        before_step: called with the step and the watch before each optimizer step.
        goal: the metric that a healthy run reaches.
        fit: a training loop of its own, where the ordinary one does not do: called with the problem and the function
            that makes a watch; returns the metric.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor, Tensor, Tensor]
    loss: Loss
    optimizer: MakeOptimizer
    batch_size: int
    steps: int
    metric: Metric
    zero_grad: bool = True
    schedule: Callable[[Optimizer], Any] | None = None
    accumulate: int = 1
    batches: Callable[[int, np.random.RandomState], NDArray] | None = None
    before_step: Callable[[int, Any], None] | None = None
    goal: float | None = None
    fit: Callable[..., float] | None = None

    @classmethod
    def of(cls, model: nn.Module, data: Data, loss: Loss, optimizer: MakeOptimizer, *rest: Any, **more: Any) -> Problem:
        """Return the problem over numpy data; floats become float32."""
        x, y, x_val, y_val = (_tensor(a) for a in data)
        return cls(model, (x, y, x_val, y_val), loss, optimizer, *rest, **more)

    @property
    def has_validation(self) -> bool:
        """Validation data are not the training data over again."""
        x, _, x_val, _ = self.data
        return x.shape != x_val.shape or not torch.equal(x, x_val)

    def but(self, **changes: Any) -> Problem:
        return replace(self, **changes)


def _tensor(array: NDArray) -> Tensor:
    return torch.as_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


@dataclass(frozen=True)
class Program:
    """A published faulty program, and its fixed twin; or a healthy one, which has no fault.

    Attributes:
        name: short and unique.
        source: where it was published.
        faults: what is wrong with it, in the words of `DIAGNOSES`; () for a healthy control.
        faulty, fixed: make the problem; a control has only `fixed`.
    """

    name: str
    source: str
    faults: tuple[str, ...]
    fixed: Callable[[], Problem]
    faulty: Callable[[], Problem] | None = None

    @property
    def is_control(self) -> bool:
        return self.faulty is None

    def make(self, seed: int, *, faulty: bool) -> Problem:
        """Return the problem with its initial values drawn from `seed`."""
        maker = self.faulty if faulty else self.fixed
        if maker is None:
            raise ValueError(f"{self.name} is a healthy control: it has no faulty twin.")
        torch.manual_seed(seed)
        np.random.seed(seed)
        return maker()


def control(name: str, source: str, make: Callable[[], Problem]) -> Program:
    """Return a healthy program."""
    return Program(name, source, (), make)
