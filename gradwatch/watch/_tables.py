"""Statistics with tables of their own: gradwatch's own measurements, and those of the user's that tell ranks apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..protocols import Statistic
from ..stats import At, GradientPieces, Number, Ranks, View
from ..stats import Statistic as WithTables
from ..torchside import wide_dtype
from ._accord import Layout
from ._columns import Columns
from ._guard import Guard
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._plan import StepPlan
from ._ranks import rank_of_this
from ._views import Views

if TYPE_CHECKING:
    from ._turn import Turn

__all__ = ["Tables", "TablesDraft", "is_awaited", "part_of", "view_of"]


Found = TypeVar("Found", bound=Measurement)


def part_of(statistic: Statistic) -> str:
    """Return what a guard calls it."""
    return statistic.part if isinstance(statistic, Measurement) else f"statistic {statistic.name!r}"


@dataclass
class TablesDraft:
    """A step's statistics with tables, whose numbers are on their way.

    Attributes:
        plan: those that are due, in order.
        parts: numbers of this rank that travel to the host, beside the tables.
        names: of each statistic's tables and numbers, as it calls them.
    """

    guard: Guard
    plan: Sequence[WithTables]
    parts: dict[str, Number] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, statistic: Statistic, numbers: Mapping[str, Number] | None) -> None:
        """Take numbers of this rank."""
        for name, value in (numbers or {}).items():
            self.parts[_joined(statistic, name)] = value
            self.names.setdefault(statistic.name, []).append(name)

    def let_go(self) -> None:
        """Leave what is about gradients: ranks have found that theirs are of unlike models."""
        self.plan = [s for s in self.plan if isinstance(s, Measurement) and not s.of_gradients]

    def put(self, host: Mapping[str, Any], columns: Columns, **known: Any) -> dict[str, float]:
        """Put what comes of them into columns; return the numbers that have a name of their own.

        Args:
            host: all that has arrived.
            columns: of the record.
            known: told to all of them besides.
        """
        scalars: dict[str, float] = {}
        for statistic in self.plan:
            names = self.names.get(statistic.name)
            if not names:
                continue
            # Not only where it has not failed on this rank: what ranks know together is on record on all of them.
            with self.guard(part_of(statistic)):
                found = statistic.conclude({name: host[_joined(statistic, name)] for name in names} | known)
                _check_names(statistic, found)
                for name, value in found.items():
                    if not isinstance(value, At):
                        scalars[name] = float(value)
                    elif len(value.places):
                        columns.put(name, value.places, value.values)
        return scalars


class Tables:
    """Measures them for one engine.

    Args:
        statistics: all that the engine has; those with tables are measured here.
        meter, guard: of the engine.
        views: makes what the user's are shown.
    """

    def __init__(self, statistics: Sequence[Statistic], meter: ModelMeter, guard: Guard, views: Views) -> None:
        found = [s for s in statistics if isinstance(s, WithTables) and s.has_tables()]
        self.statistics: tuple[WithTables, ...] = tuple(found)
        self.measurements = tuple(s for s in found if isinstance(s, Measurement))
        self._meter, self._guard, self._views = meter, guard, views

    def find(self, kind: type[Found]) -> Found | None:
        """Return the one measurement of a class; None where it is not measured."""
        return next((m for m in self.measurements if isinstance(m, kind)), None)

    def begin(self, step: int, due: Sequence[Statistic]) -> None:
        """Say that a step's forward passes begin; may be said once per micro-batch."""
        for statistic in due:
            if isinstance(statistic, Measurement) and self._guard.ok(statistic.part):
                with self._guard(statistic.part):
                    statistic.begin(step)

    def stepped(self, step: int, *, one_by_one: bool) -> None:
        """Say that the optimizers have stepped."""
        for measurement in self.measurements:
            if self._guard.ok(measurement.part):
                with self._guard(measurement.part):
                    measurement.stepped(step, one_by_one=one_by_one)

    def follow(self) -> None:
        """Say that other parameters are watched than before."""
        for measurement in self.measurements:
            measurement.follow()

    def forget(self) -> None:
        """Let go of what was kept for the step that goes on, as far as it is about parameters."""
        for measurement in self.measurements:
            if measurement.of_params:
                measurement.forget()

    def blank(self, plan: StepPlan, layout: Layout) -> dict[str, Tensor]:
        """Return what this rank adds to the exchange where it has nothing to say: the tables of all that are due."""
        device, ranks = self._meter.device, _ranks(plan, layout)
        wide = wide_dtype(device)
        return {
            _joined(s, name): torch.zeros(shape, dtype=wide, device=device)
            for s in plan.statistics
            for name, shape in s.tables(ranks).items()
        }

    def rerunning(self, due: Sequence[Statistic]) -> list[Measurement]:
        """Return those for which the step's micro-batches are run again."""
        return [s for s in due if isinstance(s, Measurement) and s.reruns]

    def at_once(self, step: int, due: Sequence[Statistic]) -> dict[str, float]:
        """Return what comes of those that are due at a plain step."""
        scalars: dict[str, float] = {}
        for light in due:
            if isinstance(light, Measurement):
                scalars.update(light.at_once(step))
        return scalars

    def look(
        self, turn: Turn, layout: Layout, pieces: GradientPieces, into: dict[str, Tensor], *, is_fitting: bool
    ) -> TablesDraft:
        """Measure what is due, and put what travels over ranks into the sums.

        Args:
            turn: the step.
            layout: of what is exchanged.
            pieces: what was measured of the gradients on this rank.
            into: the tables, among other sums.
            is_fitting: this rank's model is the one that the layout is of.
        """
        plan, ranks = turn.plan, _ranks(turn.plan, layout)
        draft = TablesDraft(self._guard, [s for s in plan.statistics if not _spans(s)])
        if not draft.plan:
            return draft
        view = view_of(turn, ranks, pieces)
        for statistic in draft.plan:
            names = draft.names[statistic.name] = list(statistic.tables(ranks))
            of_params = isinstance(statistic, Measurement) and statistic.of_params
            if not _meets(statistic) and (is_fitting or not of_params):
                shown = view if isinstance(statistic, Measurement) else self._own_view(statistic, turn, ranks, pieces)
                self._measure(statistic, shown, draft, names, into)
        return draft

    def _measure(
        self, statistic: WithTables, view: View, draft: TablesDraft, names: Sequence[str], into: dict[str, Tensor]
    ) -> None:
        part = part_of(statistic)
        if not self._guard.ok(part):
            return
        tables = {name: into[_joined(statistic, name)] for name in names}
        shapes = {name: table.shape for name, table in tables.items()}

        def blank() -> None:
            into.update({_joined(statistic, name): torch.zeros_like(into[_joined(statistic, name)]) for name in names})

        with self._guard(part, blank):
            numbers = statistic.measure(view, tables)
            for name, shape in shapes.items():
                if tables[name].shape != shape:
                    raise ValueError(f"table {name!r} is of shape {tuple(shape)}. Got {tuple(tables[name].shape)}")
            into.update({_joined(statistic, name): tables[name] for name in names})
            draft.add(statistic, numbers)

    def meet(self, turn: Turn, layout: Layout, draft: TablesDraft) -> None:
        """Measure those at which ranks meet: to be called on all of them."""
        for statistic in filter(_meets, draft.plan):
            with self._guard(part_of(statistic)):
                draft.add(statistic, statistic.measure(view_of(turn, _ranks(turn.plan, layout), None), {}))

    def take_part(self, turn: Turn, layout: Layout) -> None:
        """Meet the other ranks where this one has nothing to say of the step."""
        for statistic in filter(_meets, turn.plan.statistics):
            with self._guard(part_of(statistic)):
                statistic.measure(view_of(turn, _ranks(turn.plan, layout), None), {})

    def _own_view(self, statistic: Statistic, turn: Turn, ranks: Ranks, pieces: GradientPieces) -> View:
        grads, number = turn.grads, turn.inputs.optimizer
        assert grads is not None
        rank = rank_of_this()
        return self._views.of(
            statistic, turn.step, grads, pieces.shards, turn.optimizers, number, ranks=ranks, rank=rank
        )


def view_of(turn: Turn, ranks: Ranks, pieces: GradientPieces | None) -> StepView:
    """Return what gradwatch's own measurements are shown of a step."""
    assert turn.grads is not None
    scale = turn.inputs.scale
    view = StepView(
        turn.step,
        turn.grads,
        pieces,
        turn.optimizers,
        loss_scale=1.0 if scale is None else float(scale),
        ranks=ranks,
        rank=rank_of_this(),
    )
    view.number = turn.inputs.optimizer
    return view


def _check_names(statistic: Statistic, found: Mapping[str, Any]) -> None:
    known = {column.name for column in statistic.columns()}
    unknown = [] if isinstance(statistic, Measurement) else sorted(set(found) - known)
    if unknown:
        raise ValueError(f"it gives {unknown[0]!r}, which is not among its columns {', '.join(known)}")


def _joined(statistic: Statistic, name: str) -> str:
    return f"{statistic.name}/{name}"


def _meets(statistic: Statistic) -> bool:
    return isinstance(statistic, Measurement) and statistic.meets


def _spans(statistic: Statistic) -> bool:
    return isinstance(statistic, Measurement) and statistic.spans_step


def is_awaited(statistic: Statistic) -> bool:
    """Return whether rules have long waited for it."""
    return isinstance(statistic, Measurement) and statistic.is_awaited


def _ranks(plan: StepPlan, layout: Layout) -> Ranks:
    return Ranks(plan.num_ranks, layout.num_params, layout.has_copies, layout.has_batches, plan.modules)
