"""The door: a training tried again with one thing changed at a time, and everything put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from .._warn import one_line
from ..errors import ConfigError
from ..records import Tried, WhatIf, gain_of
from ..torchside import every_random_state, set_every_random_state, world_size
from ._batches import take
from ._change import Change, NotApplicable
from ._defaults import chosen
from ._generators import generators_kept
from ._of_models import NewStart, PlainStep
from ._of_optimizers import LearningRate
from ._stage import bytes_of, modules_of, on_stage, why_not_copied
from ._trial import Course, OutOfTime, Trial

__all__ = ["Bench", "what_if"]

FEWEST_STEPS = 5
"""Below so many steps nothing is told: rather fewer changes are tried."""
HELD_SHARE = 4
"""One batch in so many is held back, to judge by."""
MOST_HELD = 8
LEARNS = 0.8
"""A training that leaves less unexplained is one that learns, and is not tried with new weights."""


def what_if(  # noqa: PLR0913 - a door: flat names
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: Callable[..., Any] | None,
    batches: Iterable[Any],
    *,
    changes: Iterable[Change | str] | Change | str | None = None,
    steps: int = 20,
    seconds: float = 60.0,
    memory_limit_mb: float = 1024.0,
    accumulate: int = 1,
    clip: float | None = None,
    train_step: Callable[..., Any] | None = None,
) -> WhatIf:
    """Train some steps again with one thing changed at a time, and return which change cures the training.

    ```python
    found = gradwatch.what_if(model, optimizer, F.cross_entropy, batches)
    print(found)                    # the changes, the one that cures first
    ```

    Each change begins with the same weights, optimizer state, batches and random numbers. It trains on copies that the
    modules hold meanwhile: weights, gradients, buffers, hooks, modes, the optimizer and all random states are
    afterwards what they were, bit for bit, also after an exception or Ctrl-C. Waits for the device.

    Args:
        model: as it stands; its weights must be finite (of a run that has broken: an earlier checkpoint's).
        optimizer: that trains it; several step together.
        loss_fn: `loss_fn(outputs, targets)`; or `loss_fn(model, batch)`, told by the name of its first argument; or
            None for a model that returns its loss: as `preflight` takes it.
        batches: a list of batches, or a loader: `(x, y)`, a dict, or whatever `loss_fn(model, batch)` takes. Trained
            on are the first, again and again where there are fewer than `steps`; some are held back to judge by.
        changes: `Change` objects, or names of built-in ones; None: all of `gradwatch.trials.CHANGES`.
        steps: of each change.
        seconds: for all of it: where they do not do, fewer steps are taken, and then fewer changes tried.
        memory_limit_mb: for the copies: parameters, their gradients, buffers and optimizer state.
        accumulate: batches to a step.
        clip: the global norm that the loop clips to.
        train_step: the loop's own step, where that is to be judged too: `train_step(model, optimizer, batch)` calls
            `zero_grad`, `backward` and `step` of what it is given, and returns the loss.

    Raises:
        ConfigError: what can't be tried, and why; an argument that can't be.
        UnknownNameError: `changes` names none.
    """
    _check(model, loss_fn, steps, seconds, memory_limit_mb, accumulate)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) or not isinstance(optimizer, Iterable) else optimizer
    wanted = chosen(changes)
    num_held = max(1, min(MOST_HELD, steps // HELD_SHARE))
    with _randomness_kept():  # a loader draws on them
        taken = take(batches, steps * accumulate + num_held)
    bench = Bench(
        model=model,
        optimizers=list(optimizers),
        loss_fn=loss_fn,
        batches=taken,
        num_held=num_held,
        steps=steps,
        seconds=seconds,
        memory_limit_mb=memory_limit_mb,
        accumulate=accumulate,
        clip=clip,
        train_step=train_step,
    )
    why = bench.why_not()
    if why:
        raise ConfigError(f"what_if: {why}.")
    return bench.run(wanted)


def _check(model: Any, loss_fn: Any, steps: Any, seconds: float, memory_limit_mb: float, accumulate: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"what_if: `model` must be a module. Got {type(model).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"what_if: `loss_fn` must be callable, or None. Got {type(loss_fn).__name__}.")
    for name, value in (("steps", steps), ("accumulate", accumulate)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"what_if: `{name}` must be a whole number, 1 or more. Got {value!r}.")
    for name, number in (("seconds", seconds), ("memory_limit_mb", memory_limit_mb)):
        if not number > 0:
            raise ConfigError(f"what_if: `{name}` must be above 0. Got {number}.")


@contextmanager
def _randomness_kept() -> Iterator[None]:
    state = every_random_state()
    try:
        yield
    finally:
        set_every_random_state(state)


@dataclass(eq=False, kw_only=True)
class Bench:
    """A training that is tried again and again.

    Attributes:
        batches: to train on, and at their end those that are held back.
        num_held: how many are; where there is one batch alone it is both.
        at_least: steps that are taken of every change, however few of the changes there is time for then.
        values: id of a tensor -> what it was at the time to begin with; what is not in it begins as it is.
        sources: optimizers whose state is that of the time to begin with, or the training's own.
        rng: random states to begin with; None: the present ones.
        Others: see `what_if`.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    loss_fn: Callable[..., Any] | None
    batches: list[Any]
    num_held: int
    steps: int
    seconds: float
    memory_limit_mb: float
    accumulate: int = 1
    clip: float | None = None
    train_step: Callable[..., Any] | None = None
    at_least: int = FEWEST_STEPS
    values: Mapping[int, Tensor] = field(default_factory=dict)
    rng: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.wrapper = self.model
        while isinstance(self.model, (DistributedDataParallel, DataParallel)):
            self.model = self.model.module  # its own forward would wait for its backward
        self.modules = modules_of(self.model, self.loss_fn)
        cut = max(1, len(self.batches) - self.num_held)
        self.training, self.held = self.batches[:cut], self.batches[cut:] or self.batches[:1]
        self._measure, self._before, self.from_start = "unexplained", float("nan"), False
        self.base: Change | None = None

    def why_not(self) -> str:
        """Return why this can't be tried; "" where it can."""
        if world_size() > 1:
            return "several ranks train together, and one rank's batches would tell of another training"
        why = why_not_copied(self.model, self.modules, self.optimizers)
        if why:
            return why
        needed = bytes_of(self.modules, self.optimizers) / 2**20
        if needed > self.memory_limit_mb:
            return (
                f"copies of the model, its gradients and the optimizer's state take {needed:.0f} MiB, more than "
                f"`memory_limit_mb` ({self.memory_limit_mb:g})"
            )
        bad = [n for n, p in self.model.named_parameters() if not bool(self._begun(p).isfinite().all())]
        if bad:
            return f"weights are not finite ({bad[0]!r} among them): begin with a checkpoint from before that"
        return ""

    def _begun(self, tensor: Tensor) -> Tensor:
        return self.values.get(id(tensor), tensor).detach()

    def run(self, changes: Sequence[Change]) -> WhatIf:
        """Try the training as it is, and then every change.

        Raises:
            ConfigError: a step of the training as it is fails.
        """
        begun, rng = perf_counter(), self.rng or every_random_state()
        deadline = begun + self.seconds
        with ExitStack() as stack:
            stack.enter_context(generators_kept(self.loss_fn, self.train_step))
            stack.enter_context(_randomness_kept())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if isinstance(self.wrapper, DistributedDataParallel):
                stack.enter_context(self.wrapper.no_sync())
            try:
                found = self._round(changes, rng, deadline, begun)
            except OutOfTime:
                raise ConfigError(
                    f"what_if: {self.at_least} steps of the training as it is took more than {self.seconds:g} seconds: "
                    "raise `seconds`."
                ) from None
            found = self._beside(found, changes, rng, deadline, begun)
            if found.winner is None and self._measure == "unexplained" and not found.control.left < LEARNS:
                self.from_start = True
                with suppress(OutOfTime, ConfigError):
                    again = self._round(changes, rng, deadline, begun)
                    again = self._beside(again, changes, rng, deadline, begun)
                    found = again if again.winner is not None else found
        return replace(found, seconds=perf_counter() - begun)

    def _beside(
        self, found: WhatIf, changes: Sequence[Change], rng: Mapping[str, Any], deadline: float, begun: float
    ) -> WhatIf:
        """Where a higher rate alone cures, try repairs and other parts beside it: at a rate at which nothing moves in
        so few steps, they can't show what they do."""
        rate = next((c for c in changes if found.winner is not None and c.name == found.winner.name), None)
        if not isinstance(rate, LearningRate) or rate.factor < 1:
            return found
        telling = {each.name for each in found.tried if each.kind != "setting"}
        self.base = rate
        try:
            with suppress(OutOfTime, ConfigError):
                more = self._round([c for c in changes if c.name in telling], rng, deadline, begun)
                if more.winner is not None:
                    first = replace(more.winner, beside=rate.name)
                    return replace(found, tried=(first, *(each for each in found.tried if each.name != first.name)))
        finally:
            self.base = None
        return found

    def _round(self, changes: Sequence[Change], rng: Mapping[str, Any], deadline: float, begun: float) -> WhatIf:
        control, plain, course = self._control(rng, deadline, len(changes))
        tried: list[Tried] = []
        not_tried: dict[str, str] = {}
        for change in changes:
            reference = control if isinstance(change, PlainStep) else plain
            made = self._tried_or_why(change, course, rng, deadline, reference.left)
            if isinstance(made, Tried):
                tried.append(made)
            else:
                not_tried[change.name] = made
        return WhatIf.ranked(
            control,
            tried,
            before=self._before,
            measure=self._measure,
            steps=self.steps,
            from_start=self.from_start,
            not_tried=not_tried,
        )

    @contextmanager
    def _trial(self, rng: Mapping[str, Any], course: Course | None, *, is_plain: bool = True) -> Iterator[Trial]:
        with on_stage(self.modules, self.optimizers, self.values) as stage:
            trial = Trial(
                model=self.model,
                optimizers=stage.optimizers,
                batches=list(self.training),
                loss_fn=self.loss_fn,
                stage=stage,
                rng=rng,
                accumulate=self.accumulate,
                clip=self.clip,
                train_step=None if is_plain else self.train_step,
                has_users_step=self.train_step is not None,
                control=course,
            )
            if self.from_start:
                set_every_random_state(rng)
                NewStart().apply(trial)
            if self.base is not None:
                self.base.apply(trial)
            yield trial

    def _control(self, rng: Mapping[str, Any], deadline: float, num_changes: int) -> tuple[Tried, Tried, Course]:
        """Return the training as it is, the same with plain steps, which changes are compared with, and its course."""
        try:
            with self._trial(rng, None) as trial:
                self._before = self._first_look(trial)
                self._fit_to_time(trial, deadline, num_changes)
            plain, course = self._as_it_is(rng, deadline, is_plain=True)
            control = plain if self.train_step is None else self._as_it_is(rng, deadline, is_plain=False)[0]
        except (OutOfTime, ConfigError):
            raise
        except Exception as error:
            raise ConfigError(f"what_if: the training as it is fails: {one_line(error)}.") from error
        return control, plain, course

    def _as_it_is(self, rng: Mapping[str, Any], deadline: float, *, is_plain: bool) -> tuple[Tried, Course]:
        begun = perf_counter()
        with self._trial(rng, None, is_plain=is_plain) as trial:
            course = trial.train(self.steps, deadline)
            left = self._left(trial, course)
        return self._told(None, "setting", course, left, 0.0, perf_counter() - begun), course

    def _first_look(self, trial: Trial) -> float:
        """Return what is left to learn at first, and find out in what measure that can be told."""
        with suppress(ValueError):
            return trial.left(self.held, self._measure)
        self._measure = "loss"
        return trial.left(self.held, self._measure)

    def _fit_to_time(self, trial: Trial, deadline: float, num_changes: int) -> None:
        """Take fewer steps where those that are wanted of every change would take too long."""
        begun = perf_counter()
        trial.train(1, deadline)
        trial.train(1, deadline)
        each = (perf_counter() - begun) / 2
        left = deadline - perf_counter()
        fit = int(left / (each * (num_changes / 2 + 2) * 1.3)) if each else self.steps
        self.steps = max(min(self.steps, fit), min(self.at_least, self.steps))

    def _left(self, trial: Trial, course: Course) -> float:
        if not course.is_finite:
            return float("nan")
        try:
            return trial.left(self.held, self._measure)
        except ValueError:
            return float("nan")

    def _tried_or_why(
        self, change: Change, course: Course, rng: Mapping[str, Any], deadline: float, reference: float
    ) -> Tried | str:
        try:
            return self._try(change, course, rng, deadline, reference)
        except NotApplicable as why:
            return str(why)
        except OutOfTime:
            return f"the {self.seconds:g} seconds were over"
        except Exception as error:
            return f"it failed: {one_line(error)}"

    def _try(
        self,
        change: Change,
        course: Course,
        rng: Mapping[str, Any],
        deadline: float,
        reference: float,
    ) -> Tried:
        begun = perf_counter()
        if begun > deadline:
            raise OutOfTime
        if self.from_start and isinstance(change, NewStart):
            raise NotApplicable("all begin with new weights")
        if change.is_of_loss and self._measure == "loss":
            raise NotApplicable("it changes what the loss measures, and outputs can't be compared with targets")
        set_every_random_state(rng)
        with self._trial(rng, course) as trial:
            kind = change.kind_in(trial)
            change.apply(trial)
            mine = trial.train(self.steps, deadline)
            left = self._left(trial, mine)
        gain = gain_of(left, reference, measure=self._measure, start=self._before)
        return self._told(change, kind, mine, left, gain, perf_counter() - begun)

    def _told(
        self, change: Change | None, kind: str, course: Course, left: float, gain: float, seconds: float
    ) -> Tried:
        return Tried(
            name="" if change is None else change.name,
            kind=kind,
            cause="" if change is None else change.cause,
            advice="" if change is None else change.advice,
            losses=tuple(course.losses),
            left=left,
            is_finite=course.is_finite and isfinite(left),
            largest_norm=max(course.norms, default=float("nan")),
            gain=gain,
            seconds=seconds,
        )
