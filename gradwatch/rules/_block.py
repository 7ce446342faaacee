"""Records that are judged together: an ordinary stretch of a run is passed over at a fraction of the price."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..records import Bools, Floats, Index, StepRecord

__all__ = ["Block", "Passed"]


class Passed(NamedTuple):
    """What `Rule.pass_over` gives back for a block in which it finds nothing.

    Attributes:
        state: the memory, as judging the records one after another would have left it.
        judged: how many of the records it judged.
        reason: why it did not judge the others; "" where it judged all.
    """

    state: Any
    judged: int
    reason: str = ""


class Block:
    """Consecutive records over one index, with what rules ask of them taken out once.

    Attributes:
        records: oldest first; at least one.
    """

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    @property
    def index(self) -> Index:
        return self.records[0].index

    @cached_property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    @cached_property
    def samples(self) -> list[int]:
        return [record.num_samples for record in self.records]

    @cached_property
    def norms(self) -> list[float]:
        """The global norms."""
        return [record.global_norm for record in self.records]

    @cached_property
    def has_finite_losses(self) -> bool:
        return all(map(math.isfinite, self.losses))

    @cached_property
    def has_positive_norms(self) -> bool:
        """Whether every global norm is finite and above zero."""
        return all(0.0 < norm < math.inf for norm in self.norms)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every column and scalar that some record has."""
        columns = {name for record in self.records for name in record.columns}
        return frozenset(columns.union(*[record.scalars for record in self.records]))

    def has_any(self, names: Iterable[str]) -> bool:
        """Return whether some record has one of these columns or scalars."""
        return not self.names.isdisjoint(names)

    def scalar(self, name: str) -> list[float]:
        """Return a scalar of each record, nan where it has none."""
        return [record.scalars.get(name, math.nan) for record in self.records]

    @cached_property
    def grad_norms(self) -> tuple[Floats, Bools] | None:
        """The column `grad_norm` of all records and what of it was measured, (records, paths); None where some lacks
        it."""
        if any("grad_norm" not in record.columns for record in self.records):
            return None
        values = np.stack([record.columns["grad_norm"] for record in self.records])
        return values, np.stack([record.measured("grad_norm") for record in self.records])

    @cached_property
    def log_grad_norms(self) -> tuple[Floats, Bools] | None:
        """Logarithms of `grad_norms`, and where they are finite and measured."""
        if self.grad_norms is None:
            return None
        values, measured = self.grad_norms
        with np.errstate(all="ignore"):
            logs = np.log(values)
        return logs, np.isfinite(logs) & measured
