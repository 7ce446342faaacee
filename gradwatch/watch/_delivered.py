"""The third norm: gradients as the optimizer gets them, after all that others do to them behind gradwatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..stats import Gradients
from ..torchside import Aside, is_host, moved
from ._guard import Guard
from ._model_meter import ModelMeter
from ._produced import CADENCE
from ._ranks import world_size
from ._record_draft import Draft
from ._seals import Seals
from ._step_inputs import StepInputs
from ._timed import calm_numpy
from ._transfer import Transfer
from ._turn import Turn

__all__ = ["Delivered"]

_AHEAD, _BEHIND = "ahead", "behind"
_PART = "the norm that the optimizer gets"


def _differ(one: float, other: float) -> bool:
    """Return whether two norms differ by more than rounding; those that are not finite are alike."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) != math.isfinite(other)
    return not math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-300)


class Delivered:
    """Measures gradients in the optimizers' steps, where they lie as they will be used, and tells who changed them.

    A step measures where a gradient is another tensor, or was written to, since gradwatch left it; where the trainer is
    known to clip; and once in `CADENCE` records, since not every write shows. Where one did not show, every step
    measures. Else the norm is the one that gradwatch left, and nothing is read.

    Gradients in pieces need every rank: these are measured where all ranks know of it (the trainer's clip, the
    cadence), and every rank takes part, a failed one too.

    Attributes:
        is_next: the step that was announced comes now, and nobody can come in between.
        remarks: what changed gradients ahead of gradwatch, and what behind it, and by how much, each at the first step
            where something did.
    """

    def __init__(self, meter: ModelMeter, guard: Guard) -> None:
        self._meter, self._guard = meter, guard
        self._every = meter.options.every
        self._draft: Draft | None = None
        self._optimizers: tuple[Optimizer, ...] = ()
        self._waiting: dict[int, Seals | None] = {}
        # Any parameter lies in pieces on several ranks.
        self._in_pieces = False
        self._found: dict[int, Tensor] = {}
        self._is_due, self._is_as_left, self.is_next = False, True, False
        self._scale_left: Callable[[Optimizer], float | Tensor] | None = None
        self._after: float | None = None
        # None until one comparison has shown whether writes show.
        self._writes_show: bool | None = None
        self._remarks: dict[str, str] = {}

    def announce(self, inputs: StepInputs, optimizers: Sequence[Optimizer]) -> None:
        """Say which optimizers step next, before anything can fail."""
        if self._optimizers or self._draft is not None:
            self.forget()
        watched = self._meter.watched
        # What ZeRO steps with is used up piece by piece as it steps.
        self._optimizers = tuple(optimizers) if watched.zero is None else ()
        self._waiting = dict.fromkeys(map(id, self._optimizers))
        self._in_pieces = watched.is_in_pieces and world_size() > 1
        self.is_next = False
        self._is_due = bool(inputs.clipper) or (inputs.step // self._every) % CADENCE == 0
        self._is_due = self._is_due and inputs.step % self._every == 0
        self._scale_left = inputs.scale_left

    @property
    def is_waiting(self) -> bool:
        """Whether any step is to come."""
        return bool(self._optimizers) or self._draft is not None

    def expect(self, turn: Turn) -> None:
        """Say how gradwatch leaves the gradients, after its own treatments."""
        draft, grads, in_pieces = turn.draft, turn.grads, self._in_pieces
        assert draft is not None
        assert grads is not None
        if not self._optimizers:
            return
        if draft.vetoed and not in_pieces:
            self.forget()
            return
        self._draft = draft
        if in_pieces:
            return
        try:
            is_one = len(self._optimizers) == len(self._meter.optimizers) == 1
            is_one = is_one and grads.params is self._meter.watched.held
            if is_one and turn.seals is not None and draft.applied is None:
                self._waiting[id(self._optimizers[0])] = turn.seals  # nobody of ours has written since they were made
            else:
                for optimizer in self._optimizers:
                    self._waiting[id(optimizer)] = Seals(self._params(optimizer))
            is_known = draft.is_plain and draft.applied is None
            self._after = draft.numbers.result()["global_norm"] if is_known else _left(draft, grads)
        except Exception as error:
            self._guard.report(_PART, error)
            self.forget()

    def _params(self, optimizer: Optimizer) -> Sequence[Tensor]:
        if len(self._meter.optimizers) == 1:
            return self._meter.watched.held
        held = self._meter.watched.held_by([optimizer])
        return [p for p in self._meter.watched.held if id(p) in held]

    def stepping(self, optimizer: Optimizer) -> None:
        """An optimizer is about to move, its gradients complete."""
        waiting, in_pieces = self._waiting, self._in_pieces
        if id(optimizer) not in waiting:
            return
        seals = waiting.pop(id(optimizer))
        if not in_pieces and (seals is None or _PART in self._guard.failed):
            return
        try:
            if self._is_to_measure(seals):
                self._measure(optimizer)
            if not waiting:
                self._conclude(in_pieces)
        except Exception as error:
            self._guard.report(_PART, error)
            self.forget()

    def _is_to_measure(self, seals: Seals | None) -> bool:
        if seals is None:
            return self._is_due
        if not self.is_next:
            self._is_as_left = not seals.broken and self._is_as_left
        return self._is_due or not self._writes_show or not self._is_as_left

    @calm_numpy
    def _measure(self, optimizer: Optimizer) -> None:
        with Aside():
            scale = 1.0 if self._scale_left is None else self._scale_left(optimizer)
            self._found[id(optimizer)] = self._meter.gradients([optimizer], scale).global_norm

    def _conclude(self, in_pieces: bool) -> None:
        """Send the norm on its way, once the last of the optimizers that step together is about to move."""
        draft, after = self._draft, self._after
        if draft is None:
            return
        draft.is_as_left = None if in_pieces else self._is_as_left
        if self._found:
            for optimizer in self._optimizers:
                if id(optimizer) not in self._found and not in_pieces:
                    self._measure(optimizer)
            norms = list(self._found.values())
            with Aside():
                here = [moved(n, norms[0].device) for n in norms]
                whole = here[0] if len(here) == 1 else torch.linalg.vector_norm(torch.stack(here))
            draft.delivered = Transfer({"applied": whole})
            if after is not None and is_host(whole.device):
                self._learn(draft, after, float(whole))
        self.forget()

    def _learn(self, draft: Draft, after: float, applied: float) -> None:
        """Find out whether writes show; a comparison that arrives late counts as one that was made at once."""
        if draft.is_as_left:
            self._writes_show = self._writes_show is not False and not _differ(after, applied)

    def note(self, draft: Draft) -> None:
        """Take what a complete record says."""
        record = draft.record
        if record is None:
            return
        if draft.met is not None:
            who = "something between backward and gradwatch's look"
            kept = "The norm before is on record as global_norm"
            self._remark(_AHEAD, f"{who} clipped the gradients", record.step, record.global_norm, draft.met, kept)
        applied = record.global_norm_applied
        if applied is None or draft.delivered is None:
            return
        after = record.global_norm_after
        self._learn(draft, after, applied)
        if _differ(after, applied):
            who = draft.clipper or "something between gradwatch and the optimizer's step"
            kept = "What the optimizer got is on record as global_norm_applied"
            self._remark(_BEHIND, f"{who} changed the gradients", record.step, after, applied, kept)

    def _remark(self, place: str, what: str, step: int, old: float, new: float, kept: str) -> None:
        self._remarks.setdefault(place, f"{what}: at step {step} the norm {old:.3g} became {new:.3g}. {kept}.")

    @property
    def remarks(self) -> list[str]:
        return list(self._remarks.values())

    def forget(self) -> None:
        """Say that no step is to come."""
        self._draft = self._after = None
        self._optimizers = ()
        if self._waiting or self._found:
            self._waiting, self._found = {}, {}
        self._is_due, self._is_as_left, self.is_next = False, True, False

    def close(self) -> None:
        self.forget()


def _left(draft: Draft, grads: Gradients) -> float | None:
    """Return the norm that gradwatch leaves, where the host knows it now."""
    if draft.applied is None and draft.numbers.ready:
        return float(draft.numbers.result()["global_norm"])
    return float(grads.global_norm) if is_host(grads.device) else None
