"""What gradwatch's own measurements are made of: statistics that know the engine's meter, in a file of their name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from ..records import Column, column_of
from ..stats import GradientPieces, Gradients, Number, Ranks, Statistic, View
from ._model_meter import ModelMeter
from ._options import MeasureOptions
from ._replays import Replay
from ._step_inputs import StepInputs

__all__ = ["Measurement", "StepView"]


class StepView(View):
    """What one of gradwatch's own measurements is shown of a step.

    Attributes:
        gradients: of the parameters that step now.
        pieces: what was measured of them on this rank; None once it has been merged over ranks.
        optimizers: that step next.
        loss_scale: what gradients carry inside backward.
        number: of the optimizer that steps on its own; None where all step together.
    """

    number: int | None = None

    def __init__(
        self,
        step: int,
        gradients: Gradients,
        pieces: GradientPieces | None,
        optimizers: Sequence[Optimizer],
        *,
        loss_scale: float,
        ranks: Ranks,
        rank: int,
    ) -> None:
        super().__init__(step, (), {})
        self.ranks, self.rank = ranks, rank
        self.gradients, self.pieces, self.optimizers, self.loss_scale = gradients, pieces, optimizers, loss_scale


class Measurement(Statistic):
    """A statistic that comes with gradwatch and is switched on by an option; `measurements` lists all.

    It has `tables`, `look` in the place of `measure`, and `conclude`. What it must hear of besides is below, and does
    nothing by default.

    Attributes:
        part: what it is called where it fails.
        gives: names of what it puts on record, as `gradwatch.records.column_of` knows them.
        every: set from the options where these say.
        of_ranks: tells ranks apart, and is measured where there are several.
        of_gradients: says nothing at a step at which ranks find out that their models are unlike.
        of_params: speaks of parameters by their place: says nothing on a rank whose model has changed alone.
        meets: ranks meet while it measures, in collectives of its own, after the step's exchange.
        reruns: a step's micro-batches are kept for it, and run again.
        unseen: says where that can't be done, with the reason in the braces.
        spans_step: looks before the optimizers' step and after it, in the place of `look`; `conclude` is told what was
            `measured`, a mask over the index, where some of the step's gradients turned out to be on no rank.
        is_light: takes no more than a plain step has: on one rank it is measured there, too.
        is_awaited: rules have long waited for it: a step with it is judged as soon as its numbers are there.
    """

    num_sums = 0
    part: str = ""
    gives: tuple[str, ...] = ()
    of_ranks: bool = False
    of_gradients: bool = True
    of_params: bool = False
    meets: bool = False
    reruns: bool = False
    unseen: str = "{}"
    spans_step: bool = False
    is_light: bool = False
    is_awaited: bool = False

    def __init__(self, meter: ModelMeter) -> None:
        self.meter = meter

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        """Return whether the options ask for it."""
        return True

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """Return what is known of what it gives."""
        return tuple(column for name in cls.gives if (column := column_of(name)) is not None)

    def measure(self, view: View, tables: dict[str, Tensor]) -> Mapping[str, Number] | None:
        """Do what `look` does."""
        assert isinstance(view, StepView)
        return self.look(view, tables)

    def look(self, view: StepView, tables: dict[str, Tensor]) -> Mapping[str, Number] | None:
        """See `Statistic.measure`. Tables are empty where `tables` has none for these ranks."""
        return None

    def begin(self, step: int) -> None:
        """Hear that the forward passes of a step begin at which it is due; may be called once per micro-batch."""

    def rerun(self, replays: Sequence[Replay], inputs: StepInputs) -> None:
        """Run the step's micro-batches again before it is measured, where `reruns`; what is found is for `look`.

        Raises:
            ValueError: why nothing can be found.
        """

    def before_step(self, view: StepView, *, moves: bool) -> None:
        """Get ready before the optimizers step, where `spans_step`.

        Args:
            view: of the step.
            moves: whether this rank steps and can measure. If not, it takes part all the same where the others may wait
                for it.
        """

    def after_step(self) -> Mapping[str, Number] | None:
        """Return numbers for `conclude`, once the last optimizer has moved; None where `before_step` kept nothing."""
        return None

    def drop(self) -> None:
        """Forget what `before_step` has kept: the step did not happen."""

    def stepped(self, step: int, *, one_by_one: bool) -> None:
        """Hear that the optimizers have stepped, where there are several ranks, due or not.

        Args:
            step: that is over.
            one_by_one: several optimizers step each on its own in one step.
        """

    def follow(self) -> None:
        """Hear that other parameters are watched than before."""

    def forget(self) -> None:
        """Let go of what was kept for the step that goes on: this rank's model is another one. May be called twice."""

    def close(self) -> None:
        """Take hooks off, let go of everything. May be called twice."""
        self.forget()

    def notes(self) -> list[str]:
        """Return what it could not see, in sentences."""
        return []

    def at_once(self, step: int) -> Mapping[str, float]:
        """Return what goes on record of a plain step of one rank, where `is_light`."""
        return {}
