"""Surgery in a run: between the losses of tasks, or between accumulated micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..torchside import clean_path
from ..treatments.surgery import (
    MicroBatchController,
    MicroBatchSurgery,
    Surgery,
    SurgeryController,
    TrainingStepTap,
    collecting,
)
from ._settings import Settings

__all__ = ["Tasks", "tasks_of", "wants_tasks"]

Named = Iterable[tuple[str, nn.Parameter]]


def wants_tasks(surgery: Any, conflicts_every: int | None, rules: Sequence[Any]) -> bool:
    """Return whether task losses are to be collected: surgery now, diagnosis, or a rule that may switch surgery on."""
    behind_rule = any(isinstance(t, Surgery) for rule in rules for t in rule.then)
    return surgery is not None or conflicts_every is not None or behind_rule


class Tasks:
    """Holds the surgeons of one run, and passes the training's events on to them.

    Args:
        surgery: `Surgery`, `MicroBatchSurgery`, or None (conflicts are only measured).
        named: (path, parameter) of the model.
        conflicts_every: at every how many steps conflicts are measured where no surgery is due.
        module: the LightningModule whose `training_step` gives the losses; None in plain loops.
    """

    def __init__(self, surgery: Any, named: Named, *, conflicts_every: int | None, module: Any = None) -> None:
        named = list(named)
        is_micro = isinstance(surgery, MicroBatchSurgery)
        self.micro = MicroBatchController(surgery, named) if is_micro else None
        self.tasks = SurgeryController(None if is_micro else surgery, named, diagnose_every=conflicts_every or 0)
        self._tap = None if module is None or is_micro else TrainingStepTap(module, self.tasks)

    def begin(self, step: int) -> None:
        """Say which step the coming micro-batch belongs to. Losses whose backward never came go, graphs and all."""
        self.tasks.discard()
        self.tasks.step = step
        if self.micro is not None:
            self.micro.step = step

    def before_backward(self, loss: Tensor, grad_scale: float) -> None:
        """Probe the tasks of this micro-batch; `loss` is what backward will be called on."""
        self.tasks.before_backward(loss, grad_scale=grad_scale)

    def after_backward(self, *, last: bool, grad_scale: float, batch_size: float) -> None:
        """Clean up after one backward; after the last one combine the micro-batches."""
        self.tasks.after_backward()
        if self.micro is not None:
            self.micro.after_backward(last=last, grad_scale=grad_scale, batch_size=max(batch_size, 1.0))

    def switch(self, surgery: Any) -> None:
        """Do this surgery from the next micro-batch on; None ends it."""
        self.tasks.switch(surgery)

    def report(self) -> dict[str, float]:
        """Return the scalars of the step, whose backwards are over."""
        self.tasks.after_backward()
        return {**self.tasks.report(), **(self.micro.report() if self.micro is not None else {})}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Let `split` reach the tasks inside."""
        with collecting(self.tasks):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": self.tasks.state_dict(), "micro": {} if self.micro is None else self.micro.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("tasks"):
            self.tasks.load_state_dict(state["tasks"])
        if self.micro is not None and state.get("micro"):
            self.micro.load_state_dict(state["micro"])

    def close(self) -> None:
        """Leave nothing behind. May be called twice."""
        if self._tap is not None:
            self._tap.close()
        self.tasks.close()
        if self.micro is not None:
            self.micro.discard()


def tasks_of(settings: Settings, model: nn.Module, module: Any = None) -> Tasks | None:
    """Return what collects the task losses of a run, or None where nothing asks for them."""
    surgery, every = settings.surgery, settings.options.conflicts_every
    if not wants_tasks(surgery, every, settings.book.rules):
        return None
    named = [(clean_path(n), p) for n, p in model.named_parameters()]
    return Tasks(surgery, named, conflicts_every=every, module=module)
