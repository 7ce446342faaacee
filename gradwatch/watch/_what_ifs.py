"""What would cure it: what it takes to try a training again is kept, and at its first critical incident it is tried."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..records import CHANGE_KINDS, Incident, WhatIf
from ..samples import loss_function, matching_losses
from ..torchside import Aside, every_random_state, size_of, tensors_of
from ._batch import split_batch
from ._prediction import Forward
from ._ranks import world_size
from ._settings import Settings
from ._step_inputs import StepInputs

__all__ = ["WhatIfs", "what_ifs_of"]

EVERY = 16
"""Steps between two snapshots; two are held."""
NUM_STEPS = 2 * EVERY + 8
"""Steps whose batches are held: those since the older snapshot, and some to judge by."""
BEFORE = 4
"""A snapshot is of so many steps before the incident, where there is one: by then nothing is spoilt."""
STEPS, SECONDS = 20, 30.0


@dataclass
class _Snapshot:
    """A training at a step: values of tensors by their ids, optimizers with a state of their own, random states."""

    step: int
    values: Mapping[int, Tensor]
    optimizers: list[Optimizer]
    rng: Mapping[str, Any]


@dataclass
class _Step:
    step: int
    batches: list[Any] = field(default_factory=list)
    versions: list[list[tuple[Tensor, int]]] = field(default_factory=list)
    num_bytes: int = 0


class WhatIfs:
    """Keeps snapshots and batches of a run, and tries its training again with one thing changed at a time.

    Args:
        model: that is trained.
        optimizers: raw torch optimizers.
        loss_fn: as `gradwatch.what_if` takes it; None: a model that returns its loss, or one of torch's loss functions
            that what `step` is given comes to.
        limit_bytes: of what is held.

    Attributes:
        loss_fn: may be set by a trainer's adapter, which knows how the loss is made.
        why_not: why nothing is kept; "" while it is.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], loss_fn: Callable[..., Any] | None, limit_bytes: int
    ) -> None:
        self.model, self.optimizers = model, list(optimizers)
        self.loss_fn = loss_fn
        self.why_not = ""
        self._limit = limit_bytes
        self._snapshots: deque[_Snapshot] = deque(maxlen=2)
        self._steps: deque[_Step] = deque(maxlen=NUM_STEPS)
        self._now = _Step(-1)
        self._clip: float | None = None
        self._is_done = False

    @property
    def is_open(self) -> bool:
        """Whether there is something to keep, or to say."""
        return not self._is_done

    def begin(self, step: int) -> None:
        """Say that the forward passes of a step begin; takes a snapshot where one is due."""
        if self._is_done or self.why_not or self._now.step == step:
            return
        self._now = _Step(step)
        last = self._snapshots[-1].step if self._snapshots else -EVERY
        if step >= last + EVERY:
            self._take(step)

    def _take(self, step: int) -> None:
        from ..trials import bytes_of, copy_of, modules_of, why_not_copied

        modules = modules_of(self.model, self.loss_fn)
        several = "several ranks train together, and one rank's batches would tell of another training"
        self.why_not = several if world_size() > 1 else why_not_copied(self.model, modules, self.optimizers)
        # Two snapshots, and what a trial takes.
        needed = 3 * bytes_of(modules, self.optimizers)
        if not self.why_not and needed > self._limit:
            needed_mb, limit_mb = needed / 2**20, self._limit / 2**20
            self.why_not = (
                f"snapshots and copies of the training take {needed_mb:.0f} MiB, more than `memory_limit_mb` "
                f"({limit_mb:.0f})"
            )
        if self.why_not:
            self.forget()
            return
        with Aside():
            held = [t for m in modules for own in (m._parameters, m._buffers) for t in own.values() if t is not None]
            values = {id(t): t.detach().clone() for t in held}
            optimizers = [copy_of(optimizer) for optimizer in self.optimizers]
        self._snapshots.append(_Snapshot(step, values, optimizers, every_random_state()))

    def see(self, batch: Any) -> None:
        """Look at a micro-batch of the step that goes on; the same one may be shown twice."""
        if self._is_done or self.why_not or batch is None or type(batch) is Forward:
            return
        if any(batch is known for known in self._now.batches):
            return
        tensors = [t for _, t in tensors_of(batch, objects=True)]
        seen = [t for pairs in self._now.versions for t, _ in pairs]
        if not tensors or all(any(t is known for known in seen) for t in tensors):
            return  # it was shown already, perhaps in another container
        self._now.batches.append(batch)
        self._now.versions.append([(t, t._version) for t in tensors])
        self._now.num_bytes += size_of(tensors)
        self._keep_within(self._limit // 4)

    def _keep_within(self, limit: int) -> None:
        while self._steps and sum(s.num_bytes for s in self._steps) + self._now.num_bytes > limit:
            self._steps.popleft()

    def stepped(self, inputs: StepInputs) -> None:
        """Say that the batches of a step are complete, and what is known of it."""
        if self._is_done or self.why_not:
            return
        if inputs.optimizer is not None:
            self.why_not = "several optimizers step each on its own"
            self.forget()
            return
        clip = inputs.scalars.get("trainer_clip")
        self._clip = self._clip if clip is None else float(clip)
        self._find_loss(inputs)
        if self._now.batches:
            self._now.step = inputs.step
            self._steps.append(self._now)
            self._now = _Step(-1)

    def _find_loss(self, inputs: StepInputs) -> None:
        """Find out which of torch's loss functions made the loss, where nobody said."""
        if self.loss_fn is not None or len(inputs.losses) != 1:
            return
        outputs, loss = inputs.outputs, inputs.losses[0]
        targets = inputs.targets if inputs.targets is not None else split_batch(inputs.batch)[1]
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return
        with Aside():
            made = matching_losses(outputs, targets, float(loss.detach() if isinstance(loss, Tensor) else loss))
        if made is not None:
            self.loss_fn = loss_function(made.name, made.reduction)

    def forget(self) -> None:
        """Let go of all that is held."""
        self._snapshots.clear()
        self._steps.clear()
        self._now = _Step(-1)

    def close(self) -> None:
        """Let go of everything, for good."""
        self._is_done, self.loss_fn = True, None
        self.forget()

    def answer(self, incident: Incident) -> WhatIf:
        """Return what cures an incident; whatever comes of it, nothing is kept afterwards."""
        try:
            return self._tried(incident)
        finally:
            self.close()

    def _tried(self, incident: Incident) -> WhatIf:
        from ..trials import CHANGES, Bench

        why = self.why_not or self._why_nothing()
        snapshot = self._before(incident.first_step)
        if why or snapshot is None:
            return WhatIf(why_not=why or "there is no snapshot from before")
        since = [s for s in self._steps if s.step >= snapshot.step]
        earlier = [s for s in self._steps if s.step < snapshot.step][-4:]
        counts = {len(s.batches) for s in (*since, *earlier)}
        if len(counts) != 1:
            return WhatIf(why_not="steps hold different numbers of batches" if counts else "no batch was seen")
        accumulate = counts.pop()
        held = [batch for s in earlier for batch in s.batches] or since[-1].batches
        bench = Bench(
            model=self.model,
            optimizers=snapshot.optimizers,
            loss_fn=self.loss_fn,
            batches=[*(batch for s in since for batch in s.batches), *held],
            num_held=len(held),
            steps=max(STEPS, len(since)),
            at_least=len(since),
            seconds=SECONDS,
            memory_limit_mb=self._limit / 2**20,
            accumulate=accumulate,
            clip=self._clip,
            values=snapshot.values,
            rng=snapshot.rng,
        )
        # The most telling first: time may be over before all were tried.
        changes = sorted(CHANGES, key=lambda change: CHANGE_KINDS.index(change.kind))
        try:
            found = WhatIf(why_not=why) if (why := bench.why_not()) else bench.run(changes)
        except ConfigError as error:
            return WhatIf(why_not=str(error).removeprefix("what_if: ").rstrip("."))
        if incident.rule == "non_finite" and not found.why_not and found.control.is_finite:
            return replace(
                found, tried=(), why_not=f"the same {found.steps} steps stayed finite when they were taken again"
            )
        return found

    def _why_nothing(self) -> str:
        if not self._steps:
            return "no batch was seen: hand it over, `watch.step(loss, batch=(x, y))`"
        if any(t._version != version for s in self._steps for pairs in s.versions for t, version in pairs):
            return "batches were written over since they were trained on"
        return ""

    def _before(self, step: int) -> _Snapshot | None:
        known = [s for s in self._snapshots if s.step <= step]
        early = [s for s in known if s.step <= step - BEFORE]
        return next(iter((early or known)[-1:]), None)


def what_ifs_of(settings: Settings, model: nn.Module, optimizers: Sequence[Optimizer]) -> WhatIfs | None:
    """Return what tries a run's training again; None where nobody asked for it."""
    if settings.what_if is False:
        return None
    loss_fn = None if settings.what_if is True else settings.what_if
    return WhatIfs(model, optimizers, loss_fn, settings.options.memory_limit_bytes)
