"""All that was measured, and done, at one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from .._markup import Prints
from ._histogram import Histogram
from ._index import Bools, Floats, Index
from ._shown import record_html, record_text

__all__ = ["StepRecord", "TreatmentReport", "iter_scalars"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreatmentReport:
    """What one treatment did to one step.

    Attributes:
        name: of the treatment, in snake case.
        rule: the rule it ran behind, or "" where it runs on every step.
        before: global norm before it, unscaled.
        after: global norm after it; nan where the step was vetoed.
        applied: it changed something (a clip that clipped, a skip that skipped).
        values: anything else it has to say, by name (`coefficient`, `limit`, `clipped_share`, ...).
    """

    name: str
    rule: str = ""
    before: float = float("nan")
    after: float = float("nan")
    applied: bool = True
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRecord(Prints):
    """All that was measured at one optimizer step.

    Norms are L2, of gradients as the optimizer will use them: unscaled, accumulated, reduced over ranks, whole.
    A number may be inf or nan: that is a measurement, not an error.

    Attributes:
        step: optimizer steps taken before this one.
        epoch, batch_idx: as the trainer counts; -1 where it does not.
        num_samples: in this step's batches, all accumulated micro-batches together; 0 where unknown.
        time: seconds since the epoch, when the record was made.
        loss: mean over the accumulated micro-batches; nan where not given (then `has_loss` is False).
        lr: largest learning rate over the optimizers' groups.
        global_norm: before any treatment or clip; over the parameters in the optimizer that have a gradient. Nan where
            no gradient was seen (then `has_gradient` is False): what was not seen is not zero.
        global_norm_after: after all of gradwatch's treatments; equal to `global_norm` where there were none, and nobody
            clipped before. What the optimizer got in the end is `global_norm_applied`.
        index: what the columns run over.
        columns: name -> float64, shape (len(index),). A column that was not measured at this step is absent.
        masks: name -> bool, shape (len(index),): which paths the column holds a measurement for. Absent: all.
        scalars: what was measured once: `val_loss`, `grad_scale`, `num_overflows`, `output_variance`, ...
        histograms: parameter path -> exponent histogram of its gradient.
        treatments: what was done, in order.
        skipped: the optimizer was kept from moving anything at this step.
        has_gradient: a gradient was seen, of one parameter at least.
        unseen: path -> why it counts neither as measured nor as without a gradient; "" stands for the whole model.
    """

    step: int
    index: Index
    epoch: int = -1
    batch_idx: int = -1
    num_samples: int = 0
    time: float = 0.0
    loss: float = float("nan")
    has_loss: bool = True
    lr: float = float("nan")
    global_norm: float = float("nan")
    global_norm_after: float = float("nan")
    columns: Mapping[str, Floats] = field(default_factory=dict)
    masks: Mapping[str, Bools] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    treatments: tuple[TreatmentReport, ...] = ()
    skipped: bool = False
    has_gradient: bool = True
    unseen: Mapping[str, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # Views of mappings can't be copied.
        return {name: dict(v) if isinstance(v, MappingProxyType) else v for name, v in vars(self).items()}

    def __repr__(self) -> str:
        loss = f", loss={self.loss:.6g}" if self.has_loss else ""
        return f"StepRecord(step={self.step}{loss}, global_norm={self.global_norm:.6g}, {len(self.index)} paths)"

    def __str__(self) -> str:
        return record_text(self)

    def _repr_html_(self) -> str:
        return record_html(self)

    def __getitem__(self, key: tuple[str, str]) -> float:
        """Return one number: `record["grad_norm", "encoder.0.weight"]`.

        Raises:
            KeyError: the column was not measured at this step, or not for this path.
        """
        name, path = key
        column = self.columns.get(name)
        if column is None:
            raise KeyError(f"step {self.step} has no column {name!r}. It has {sorted(self.columns)}.")
        i = self.index.position(path)
        if not self.measured(name)[i]:
            raise KeyError(f"step {self.step} has no {name!r} for {path!r}: it was not measured (no gradient).")
        return float(column[i])

    @property
    def global_norm_applied(self) -> float | None:
        """The global norm as the optimizer got it, after the treatments and whatever else changed gradients; None where
        it did not move, or where that was not measured."""
        return self.scalars.get("global_norm_applied")

    def measured(self, name: str) -> Bools:
        """Return which paths the column holds a measurement for; none where the column is absent."""
        if name not in self.columns:
            return np.zeros(len(self.index), np.bool_)
        mask = self.masks.get(name)
        return np.ones(len(self.index), np.bool_) if mask is None else mask

    @property
    def accounted(self) -> Bools:
        """Which paths are not among `unseen`: those alone can be judged. Shape (len(index),)."""
        known = np.ones(len(self.index), np.bool_)
        known[[i for path in self.unseen if (i := self.index.positions.get(path)) is not None]] = False
        return known

    def rollup(self, by: str = "block", column: str = "grad_norm") -> dict[str, float]:
        """Return norms over modules, blocks or the model, from sums of squares (never from means of norms).

        Args:
            by: `"module"` (the module that owns the parameter), `"block"` or `"model"` (one key, "").
            column: a column of norms over parameters.
        """
        values, chosen = self.columns.get(column), self.measured(column) & self.index.is_parameter
        if values is None:
            return {}
        keys: dict[str, Sequence[str]] = {
            "module": [p.rpartition(".")[0] for p in self.index.paths],
            "block": self.index.blocks,
            "model": [""] * len(self.index),
        }
        groups: dict[str, list[float]] = {}
        for i in np.flatnonzero(chosen).tolist():
            groups.setdefault(keys[by][i], []).append(float(values[i]))
        # hypot by scaling: squares of values below 1e-162 or above 1e154 leave float64.
        return {k: _norm(np.asarray(v)) for k, v in groups.items()}


def _norm(values: Floats) -> float:
    largest = float(np.max(np.abs(values)))
    if not 0 < largest < np.inf:
        return largest
    return largest * float(np.sqrt(np.sum((values / largest) ** 2)))


def iter_scalars(record: StepRecord) -> Iterator[tuple[str, float]]:
    """Yield every scalar of a record with its name: loss, lr, the global norms, then `scalars`; none not known."""
    if record.has_loss:
        yield "loss", record.loss
    yield "lr", record.lr
    if record.has_gradient:
        yield "global_norm", record.global_norm
        yield "global_norm_after", record.global_norm_after
    yield from record.scalars.items()
