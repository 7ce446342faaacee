"""One step of one rank, from its complete gradients to the optimizer's move, and its part in what ranks exchange."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from ..stats import Gradients
from ._context import Decision
from ._plan import StepPlan
from ._record_draft import Draft
from ._seals import Seals
from ._step_inputs import StepInputs

if TYPE_CHECKING:
    from ._after_step import AfterStep
    from ._measuring import Measuring

__all__ = ["Turn"]


class Turn:
    """What is carried through the step, and knows what the ranks have exchanged of it so far.

    Where an exception ends it early, `give_up` sends blanks in place of what was not said yet, so that no rank waits
    for this one; the others learn that it failed.

    Attributes:
        plan: what is due; equal on all ranks.
        inputs: what the trainer said.
        optimizers: that step next.
        grads: theirs; None until they were looked at.
        tensors: the gradients as they lay then, until the step was measured; None where nobody has listed them.
        seals: of the gradients as gradwatch has seen them last; None where nobody made them.
        draft: of the step's record; None until it was measured.
        decision: what treatments and actions ask for.
        has_exchanged: this rank has sent what it measured.
        has_said_whether_it_moves: the other ranks know whether to expect this one after the optimizers' step.
    """

    __slots__ = (
        "_after_step",
        "_measuring",
        "decision",
        "draft",
        "grads",
        "has_exchanged",
        "has_said_whether_it_moves",
        "inputs",
        "optimizers",
        "plan",
        "seals",
        "tensors",
    )

    def __init__(
        self,
        plan: StepPlan,
        inputs: StepInputs,
        optimizers: Sequence[Optimizer],
        measuring: Measuring,
        after_step: AfterStep,
    ) -> None:
        self.plan, self.inputs, self.optimizers = plan, inputs, optimizers
        self._measuring, self._after_step = measuring, after_step
        self.grads: Gradients | None = None
        self.tensors: list[Tensor] | None = None
        self.seals: Seals | None = None
        self.draft: Draft | None = None
        self.decision = Decision()
        self.has_exchanged = self.has_said_whether_it_moves = False

    @property
    def step(self) -> int:
        return self.inputs.step

    def give_up(self) -> None:
        """Take part with nothing to say, in all that is still to come."""
        if self.plan.is_alone or not self.plan.measures:
            return
        # If the other ranks are gone, torch's own next collective says so.
        with self._measuring.guard("telling the other ranks"):
            if self.grads is None:
                with suppress(Exception):
                    self.grads = self._measuring.meter.gradients(self.optimizers, self.inputs.grad_scale)
            if not self.has_exchanged:
                self._measuring.give_up(self)
            if not self.has_said_whether_it_moves and self.grads is not None:
                self._after_step.before(self, moves=False)
