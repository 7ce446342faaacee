"""What is to be measured at a step and who waits for it: decided once, at the step's beginning, and carried through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..protocols import Treatment
from ..rules import RuleBook, can_decide, has_limit, treatments_of
from ..stats import Statistic, is_due, next_due
from ..torchside import is_host
from ._measurement import Measurement
from ._model_meter import ModelMeter
from ._options import MeasureOptions
from ._ranks import are_several, world_size

__all__ = ["ALERT_STEPS", "Planner", "StepPlan", "acts_in_step", "reasons_to_wait"]

MAX_ALARMS = 32
"""Alarms of a run after which histograms are taken, the first ones."""
ALERT_STEPS = 3
"""Steps that are looked at closely after an alarm."""


class StepPlan(NamedTuple):
    """What happens at a step: the same on all ranks, since the vector in which ranks exchange it has this layout.

    Attributes:
        measures: gradient norms are measured, judged and put on record.
        modules: what modules give is sampled, and what can be said of the batch.
        histograms: of the gradients' exponents, with their details.
        statistics: with tables of their own, that are measured beside all this.
        num_ranks: that take part.
        is_plain: nothing but norms is due, on one rank, and what comes with them at no cost.
    """

    measures: bool
    modules: bool
    histograms: bool
    statistics: tuple[Statistic, ...]
    num_ranks: int
    is_plain: bool

    @property
    def is_alone(self) -> bool:
        """Whether no other rank waits for this one."""
        return self.num_ranks == 1


class Planner:
    """Makes the plan of every step.

    Attributes:
        plain_until: before this step, as far as is known by now, nothing but norms is due at those that come next.

    Args:
        options: the cadences.
        meter: what is watched.
        statistics: all that have tables of their own.
        waits: every step waits for its numbers.
    """

    def __init__(
        self, options: MeasureOptions, meter: ModelMeter, statistics: Sequence[Statistic] = (), *, waits: bool
    ) -> None:
        self._options, self._meter, self._waits = options, meter, waits
        self._statistics = tuple(statistics)
        self._alert_until = -1
        self._num_alarms, self._histograms_at = 0, -1
        self._step = -1
        self._plan: StepPlan | None = None
        self._plain_from = self.plain_until = 0

    def at(self, step: int) -> StepPlan:
        """Return the plan of a step: as it was when the step was first asked for, whatever was learnt since."""
        if self._plan is not None:
            if step == self._step:
                return self._plan
            plain = self._plain_from <= step < self.plain_until and step > self._meter.sample_until
            if plain and not are_several():
                self._step = step
                return self._plan
        self._step, self._plan = step, self._made(step)
        self._plain_from, self.plain_until = (step, self._next_due(step)) if self._plan.is_plain else (0, 0)
        return self._plan

    def _made(self, step: int) -> StepPlan:
        options, ranks = self._options, world_size()
        sampled = options.activations_every
        is_alike = ranks == 1 or self._judges_alike
        is_alert = (step <= self._alert_until and is_alike) or step <= self._meter.sample_until
        modules = sampled is not None and (is_alert or is_due(step, sampled))
        histograms = is_due(step, options.histograms_every) or (step == self._histograms_at and is_alike)
        statistics = tuple(s for s in self._statistics if is_due(step, s.every) and (ranks > 1 or not _of_ranks(s)))
        return StepPlan(
            measures=step % options.every == 0,
            modules=modules,
            histograms=histograms,
            statistics=statistics,
            num_ranks=ranks,
            is_plain=ranks == 1 and not (modules or histograms) and all(map(_is_light, statistics)),
        )

    def _next_due(self, step: int) -> int:
        """Return the first step after this one whose plan may be another."""
        options, here = self._options, [s.every for s in self._statistics if not _of_ranks(s)]
        if options.every != 1 or any(every != 1 and is_due(step, every) for every in here):
            return step + 1
        cadences = [options.activations_every, options.histograms_every, *(every for every in here if every != 1)]
        return min((next_due(step, n) for n in cadences if n), default=step + 1000)

    @property
    def _judges_alike(self) -> bool:
        """Whether all ranks judge a step at the same time. Numbers that are on their way arrive earlier on some than on
        others: what one rank has learnt by now, another has not."""
        return self._waits or is_host(self._meter.device)

    def look_closer(self, until: int) -> None:
        """Sample modules at every step up to one, and take histograms at the first that is not planned yet: how it was
        just after an alarm, for its case file."""
        if self._options.histograms_every is not None and self._num_alarms < MAX_ALARMS:
            self._num_alarms, self._histograms_at = self._num_alarms + 1, self._step + 1
        self._alert_until = max(self._alert_until, until)
        self.plain_until = 0


def _of_ranks(statistic: Statistic) -> bool:
    return isinstance(statistic, Measurement) and statistic.of_ranks


def _is_light(statistic: Statistic) -> bool:
    return isinstance(statistic, Measurement) and statistic.is_light


def reasons_to_wait(book: RuleBook, treatments: Sequence[Treatment], options: MeasureOptions) -> str:
    """Return what must be read in the step it belongs to, on every device; "" where nothing must."""
    # Once the optimizer has moved, weights that are not finite hide where the first such value was born.
    names = ["the autopsy"] if options.autopsy else []
    names += [f"treatment {t.name!r}" for t in treatments if t.needs_host]
    for rule in book.rules:
        # Whether one norm above its alarm makes it fire is decided on the device; all else is for the judge.
        acts_at_once = rule.for_steps <= 1 and rule.treat_after <= 1
        if treatments_of(rule) and not (acts_at_once and has_limit(rule)):
            names.append(f"rule {rule.name!r} with a treatment")
    return ", ".join(names)


def acts_in_step(book: RuleBook) -> bool:
    """Return whether a step whose numbers are there is judged at once: a rule acts that does not judge the norm alone.

    What a rule that does finds is unusual in itself, and wakes the judge.
    """
    return not all(map(has_limit, filter(can_decide, book.rules)))
