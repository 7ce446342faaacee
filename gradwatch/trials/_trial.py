"""One training on copies: some steps, and what is left to learn afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from .._preflight import Task
from ..torchside import find, set_every_random_state, tensors_of
from ._batches import copied
from ._losses import LossCall, LossCalls, Rewrite
from ._score import Pair, unexplained
from ._stage import Stage

__all__ = ["Course", "OutOfTime", "Trial", "main_call"]


class OutOfTime(Exception):  # noqa: N818 (it is no error)
    """The time that was given is over."""


@dataclass
class Course:
    """What a trial's steps gave.

    Attributes:
        losses: of the steps; of the one at which something was not finite, too, where they end.
        norms: global norms of the gradients.
        is_finite: all of it was.
        first_calls: loss functions of the first step, as the user called them.
        first_loss: of the first micro-batch.
        without_gradient: ids of parameters that got no gradient at any step.
        outputs: first step's, None where they were not seen.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    is_finite: bool = True
    first_calls: list[LossCall] = field(default_factory=list)
    first_loss: float = nan
    without_gradient: set[int] = field(default_factory=set)
    outputs: Any = None

    @property
    def usual_norm(self) -> float:
        """The median of the norms that are finite; nan where none is."""
        known = [n for n in self.norms if isfinite(n)]
        return median(known) if known else nan


@dataclass(eq=False)
class Trial:
    """A training on copies, that a change may change before it begins.

    Attributes:
        model: the user's own, whose modules hold copies.
        optimizers: copies.
        batches: to train on, in this order, again and again.
        loss_fn: as `preflight` takes it.
        stage: holds the copies.
        rng: random states that steps and evaluation begin with.
        accumulate: batches to a step.
        clip: global norm that gradients are clipped to, or None.
        train_step: the user's whole step, instead of a plain one; changes are tried with plain ones.
        has_users_step: whether there is one.
        control: the course of the training as it is; None while that is run.
        on_batch: change every batch, those that are held back too.
        on_loss: change calls of torch's loss functions.
        around: contexts for forward and loss, made anew for each.
        before_step: called with the number of the step before the optimizers step.
        only_main: train on the largest call of a loss function alone.
        sign: what the loss is multiplied by.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    batches: list[Any]
    loss_fn: Callable[..., Any] | None
    stage: Stage
    rng: Mapping[str, Any]
    accumulate: int = 1
    clip: float | None = None
    train_step: Callable[..., Any] | None = None
    has_users_step: bool = False
    control: Course | None = None
    on_batch: list[Callable[[Any], Any]] = field(default_factory=list)
    on_loss: list[Rewrite] = field(default_factory=list)
    around: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    before_step: list[Callable[[int], None]] = field(default_factory=list)
    only_main: bool = False
    sign: float = 1.0

    @property
    def course(self) -> Course:
        """The control's."""
        assert self.control is not None
        return self.control

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The settings of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of all modules on the stage, by path where the model has one."""
        named = dict(self.model.named_parameters())
        known = {id(p) for p in named.values()}
        for number, module in enumerate(self.stage.modules):
            for name, p in module._parameters.items():
                if p is not None and id(p) not in known:
                    known.add(id(p))
                    named[f"{number}.{name}"] = p
        return named

    def train(self, steps: int, deadline: float) -> Course:
        """Take the steps.

        Raises:
            OutOfTime: the time is over.
        """
        course = Course()
        params = [p for p in self._trained() if p.requires_grad]
        course.without_gradient = {id(p) for p in params}
        set_every_random_state(self.rng)
        with _plain():
            for step in range(steps):
                if perf_counter() > deadline:
                    raise OutOfTime
                self._step(step, course, params)
                if not course.is_finite:
                    break
        return course

    def _trained(self) -> list[Tensor]:
        held = [p for group in self.groups for p in group["params"]]
        return list({id(p): p for p in (*self.parameters().values(), *held)}.values())

    def _step(self, step: int, course: Course, params: list[Tensor]) -> None:
        if self.train_step is not None:
            self._users_step(step, course, params)
            return
        optimizer = self.optimizers[0]
        if isinstance(optimizer, torch.optim.LBFGS):
            found: list[float] = []

            def closure() -> Tensor:
                loss, norm = self._backward(step, course, params)
                found[:] = found or [loss, norm]
                return torch.tensor(loss)

            optimizer.step(closure)
            self._note(course, *found)
            return
        loss, norm = self._backward(step, course, params)
        self._note(course, loss, norm)
        if course.is_finite:
            for change in self.before_step:
                change(step)
            for optimizer in self.optimizers:
                optimizer.step()

    def _note(self, course: Course, loss: float, norm: float) -> None:
        course.losses.append(loss)
        course.norms.append(norm)
        course.is_finite = isfinite(loss) and isfinite(norm)

    def _backward(self, step: int, course: Course, params: list[Tensor]) -> tuple[float, float]:
        """Put the gradients of a step into `.grad`; return loss and global norm."""
        for p in params:
            p.grad = None
        total = 0.0
        for part in range(self.accumulate):
            batch = self.batches[(step * self.accumulate + part) % len(self.batches)]
            loss, _ = self.run(batch, course)
            total += float(loss.detach()) / self.accumulate
            if loss.requires_grad:
                # Not `backward`: what else the loss depends on keeps its own gradients.
                grads = torch.autograd.grad(loss / self.accumulate, params, allow_unused=True)
                for p, g in zip(params, grads, strict=True):
                    if g is not None:
                        p.grad = g.detach() if p.grad is None else p.grad + g.detach()
        course.without_gradient -= {id(p) for p in params if p.grad is not None}
        norm = float(_norm([p.grad for p in params if p.grad is not None]))
        if self.clip is not None and norm > self.clip:
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(self.clip / (norm + 1e-6))
        return total, norm

    def _users_step(self, step: int, course: Course, params: list[Tensor]) -> None:
        batch = self._changed(self.batches[step % len(self.batches)])
        given = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
        assert self.train_step is not None
        with self._steered() as seen:
            found = self.train_step(self.model, given, batch)
        found = found if isinstance(found, (int, float, Tensor)) else find(found, "loss")
        loss = float(found.detach() if isinstance(found, Tensor) else found) if found is not None else nan
        if not course.losses:
            course.first_calls, course.first_loss = list(seen.calls), loss
        course.without_gradient -= {id(p) for p in params if p.grad is not None}
        course.losses.append(loss)
        course.norms.append(float(_norm([p.grad for p in params if p.grad is not None])))
        course.is_finite = all(bool(p.detach().isfinite().all()) for p in params)

    def _changed(self, batch: Any) -> Any:
        batch = copied(batch)
        for change in self.on_batch:
            batch = change(batch)
        return batch

    @contextmanager
    def _steered(self, *, changed: bool = True) -> Iterator[LossCalls]:
        with ExitStack() as stack:
            for make in self.around:
                stack.enter_context(make())
            yield stack.enter_context(LossCalls(self.on_loss if changed else [], self.stage.copies))

    def run(self, batch: Any, course: Course | None = None) -> tuple[Tensor, LossCalls]:
        """Return the loss of a batch, with all that was changed, and the loss functions that made it."""
        with self._steered() as seen:
            outputs, loss = Task(self.model, self._changed(batch), self.loss_fn).run()
        if course is not None and not course.losses and not course.first_calls and course.outputs is None:
            course.first_calls, course.first_loss, course.outputs = list(seen.calls), float(loss.detach()), outputs
        main = main_call(seen.calls) if self.only_main else None
        if main is not None:
            value = main.value
            loss = value if value.numel() == 1 else value.sum() / value.shape[0]
        return loss.reshape(()) * self.sign, seen

    def left(self, held: Sequence[Any], measure: str) -> float:
        """Return what the outputs of batches leave unexplained, or their mean loss; nan where it is not finite. The
        mean of what they are in eval mode and in train mode.

        Raises:
            ValueError: it can't be told.
        """
        # As it will be used, and as it learns: of statistics that lag behind the one tells late, the other nothing.
        return sum(self._left_in(mode, held, measure) for mode in (False, True)) / 2

    def _left_in(self, training: bool, held: Sequence[Any], measure: str) -> float:
        set_every_random_state(self.rng)
        pairs: list[Pair] = []
        losses: list[float] = []
        with _plain(), self.stage.mode(training=training):
            for batch in held:
                pair, loss = self._look(batch)
                losses.append(loss)
                if pair is not None:
                    pairs.append(pair)
        if measure == "unexplained":
            return unexplained(pairs)
        mean = sum(losses) / len(losses)
        return mean if isfinite(mean) else nan

    def _look(self, batch: Any) -> tuple[Pair | None, float]:
        """Return outputs and targets as the user's loss function gets them, and the loss."""
        changed = self._changed(batch)
        with self._steered(changed=False) as seen:
            task = Task(self.model, changed, self.loss_fn)
            try:
                with torch.no_grad():
                    outputs, loss = task.run()
            except RuntimeError:  # it differentiates by itself
                outputs, loss = task.run()
        main = main_call(seen.calls)
        if main is not None:
            return (main.outputs, main.targets), float(loss.detach())
        known = find(outputs, "logits")
        first = known if isinstance(known, Tensor) else next((t for _, t in tensors_of(outputs) if t.dim()), None)
        pair = (first, task.targets) if first is not None and isinstance(task.targets, Tensor) else None
        return pair, float(loss.detach())


def main_call(calls: Sequence[LossCall]) -> LossCall | None:
    """Return the call that judges most numbers."""
    return max(calls, key=lambda call: call.outputs.numel(), default=None)


@contextmanager
def _plain() -> Iterator[None]:
    """Gradients on, and the user's hooks on saved tensors (a count, an offload) off: these are not for them."""
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        yield


def _norm(grads: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm((g.to_dense() if g.is_sparse else g).float()).cpu() for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms).double()) if norms else torch.zeros(())
