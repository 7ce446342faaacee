"""A step whose numbers are still on their way, and the record that it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..protocols import Request
from ..records import Histogram, Index, StepRecord
from ._columns import Columns
from ._driver import Applied
from ._ranks import merged_extras
from ._transfer import Transfer

__all__ = ["Draft", "StepInputs"]

# Absent where a batch could not tell it; every other nan is a measurement.
_ABSENT_AS_NAN = frozenset({"output_batch_variance"})


@dataclass
class StepInputs:
    """What a trainer knows of the step.

    Attributes:
        step: optimizer steps taken before this one.
        epoch, batch_idx: as the trainer counts; -1 where it does not.
        losses: of the micro-batches, unscaled and not divided by their number; empty where unknown.
        batch, outputs, targets: of the last micro-batch, for rules that need them.
        num_samples: in all micro-batches; 0: taken from `batch`.
        grad_scale: what `.grad` is still multiplied by.
        scaler: whether a loss scaler watches over this step (an overflow is then no fault).
        scale: the loss scaler's scale, for the record.
        optimizer: which optimizer steps, where several step each on its own; None for all together.
        scalars: anything else to put on record.
    """

    step: int
    epoch: int = -1
    batch_idx: int = -1
    losses: Sequence[Any] = ()
    batch: Any = None
    outputs: Any = None
    targets: Any = None
    num_samples: int = 0
    grad_scale: float | Tensor = 1.0
    scaler: bool = False
    scale: float | None = None
    optimizer: int | None = None
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class Draft:
    """One step between its measurement and its record. Holds no gradient, no batch and no graph.

    Attributes:
        positions: in the index, of the parameters that had a gradient.
        numbers: what was measured before treatment, on its way to the host.
        scalars: what is known on the host already.
        tap: turns the modules' sums into columns; None on steps without samples.
        loss_scale: of the loss scaler, that the gradients inside backward carry.
        extras: names of the scalars that are means over what each rank knew for itself.
        failed: on how many ranks this step could not be measured, on the device; None where there is one rank.
        num_ranks: of the run.
        num_batches: how many ranks work on batches of their own; the loss of the whole is the mean of theirs.
        tap_positions: in the index, of the modules.
        spread_positions: in the index, of the weights whose rows were compared.
        applied, treated: the treatments that ran, and their numbers on the way.
        update_positions, updates: the parameters whose update was measured, and its numbers on the way.
        record: once the numbers have arrived.
    """

    step: int
    index: Index
    when: float
    epoch: int
    batch_idx: int
    lr: float
    scaler: bool
    positions: NDArray[np.int64]
    numbers: Transfer
    scalars: dict[str, float]
    tap: Any = None
    loss_scale: float = 1.0
    extras: tuple[str, ...] = ()
    failed: Tensor | None = None
    num_ranks: int = 1
    num_batches: int = 1
    tap_positions: NDArray[np.int64] | None = None
    spread_positions: NDArray[np.int64] | None = None
    applied: Applied | None = None
    treated: Transfer | None = None
    update_positions: NDArray[np.int64] | None = None
    updates: Transfer | None = None
    vetoed: bool = False
    record: StepRecord | None = None

    @property
    def ready(self) -> bool:
        """Whether every number has arrived on the host."""
        return all(t is None or t.ready for t in (self.numbers, self.treated, self.updates))

    @property
    def optimizer(self) -> int:
        return int(self.scalars.get("optimizer", 0))

    def note_limit(self, limits: Iterable[float]) -> None:
        """Put the smallest global norm that some rule would not accept on record; nothing where none has a bar yet."""
        finite = [limit for limit in limits if math.isfinite(limit)]
        if finite:
            self.scalars["limit"] = min(finite)

    def build(self, norms: NDArray[np.float64] | None = None) -> StepRecord:
        """Make the record of what was measured before treatment.

        Args:
            norms: gradient norms after a second look; the measured ones where None.
        """
        host = self.numbers.result()
        global_norm = float(host["global_norm"])
        if norms is None:
            norms = host["norms"]
        else:
            global_norm = _norm(norms)
        columns = Columns(len(self.index))
        columns.put("grad_norm", self.positions, norms)
        numel = self.index.numel[self.positions].astype(np.float64)
        histograms: dict[str, Histogram] = {}
        if "details_sums" in host:
            columns.put_details(self.positions, host, numel)
            counts = host["histograms"].astype(np.int64)
            columns.put_underflow(self.positions, counts)
            histograms = {self.index.paths[i]: Histogram(c) for i, c in zip(self.positions, counts, strict=True)}
        if "row_spread" in host and self.spread_positions is not None:
            columns.put("row_spread", self.spread_positions, host["row_spread"])
        if self.tap is not None and self.tap_positions is not None:
            found = self.tap.to_columns(
                host["tap_sums"], host["tap_maxima"], grad_scale=self.loss_scale * self.num_batches
            )
            columns.put_modules(self.tap_positions, *found)
        scalars = self.scalars | {k[6:]: float(v) for k, v in host.items() if k.startswith("batch/")}
        scalars |= self._of_ranks(host)
        overflow = self.scaler and not math.isfinite(global_norm)
        if self.scaler:
            scalars["amp_overflow"] = float(overflow)
        loss = host.get("loss")
        loss = None if loss is None or loss[1] == 0 else loss
        self.record = StepRecord(
            step=self.step,
            index=self.index,
            epoch=self.epoch,
            batch_idx=self.batch_idx,
            num_samples=int(host["samples"]) * self.num_batches // self.num_ranks,
            time=self.when,
            loss=math.nan if loss is None else float(loss[0] / loss[1]),
            has_loss=loss is not None,
            lr=self.lr,
            global_norm=global_norm,
            global_norm_after=global_norm,
            columns=columns.values,
            masks=columns.masks,
            scalars={k: v for k, v in scalars.items() if not (math.isnan(v) and k in _ABSENT_AS_NAN)},
            histograms=histograms,
            skipped=overflow,
        )
        return self.record

    @property
    def num_failed(self) -> int:
        """On how many ranks this step could not be measured."""
        return int(self.numbers.result().get("failed", np.zeros(())))

    def out_of_step(self) -> list[Request]:
        """Ask for a stop where a treatment failed at the step before on some ranks only: their weights differ since."""
        count = int(self.numbers.result().get("treatments_failed", np.zeros(())))
        if not 0 < count < self.num_ranks:
            return []
        reason = (
            f"a treatment, or a rule that carries one, failed on {count} of {self.num_ranks} ranks before step "
            f"{self.step}: these did not do what the others did, and weights may differ between ranks. Resume from the "
            "last checkpoint."
        )
        return [Request(kind="stop", reason=reason, values={"error": True})]

    def _of_ranks(self, host: dict[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return what tells ranks apart, and the means of what each knew for itself."""
        found: dict[str, float] = {}
        if "extras" in host:
            found |= merged_extras(self.extras, host["extras"], self.num_ranks)
        norms = host.get("norm_of_rank")
        if norms is not None and norms.any() and np.isfinite(norms).all():
            found["rank_spread"] = float((norms.max() - norms.min()) / norms.max())
        own = host.get("local_norms")
        if own is not None and own.any():
            found |= {f"local_norm/{rank}": float(norm) for rank, norm in enumerate(own)}
        return found

    def add_treatments(self) -> StepRecord:
        """Put what the treatments did into the record."""
        assert self.record is not None
        assert self.applied is not None
        assert self.treated is not None
        host = self.treated.result()
        if "veto" in host:
            self.vetoed = bool(host["veto"])
        after = float(host["global_norm_after"]) if self.applied.names else self.record.global_norm
        scalars = dict(self.record.scalars)
        if "trainer_clip" in scalars:
            # The trainer's own clip comes later and is not seen; this is what it leaves (C8).
            scalars["global_norm_applied"] = after * min(1.0, scalars["trainer_clip"] / (after + 1e-6))
        self.record = replace(
            self.record,
            scalars=scalars,
            treatments=self.applied.reports(host),
            global_norm_after=after,
            skipped=self.vetoed or self.record.skipped,
        )
        return self.record

    def add_updates(self) -> StepRecord:
        """Put the size of the update into the record, where it was measured and the step was taken."""
        assert self.record is not None
        if self.updates is None or self.update_positions is None or self.record.skipped:
            return self.record
        found = self.updates.result()
        if (found["update_norm"] < 0).any():
            return self.record
        columns = Columns(len(self.index), dict(self.record.columns), dict(self.record.masks))
        numel = self.index.numel[self.update_positions].astype(np.float64)
        columns.put_updates(self.update_positions, found, numel)
        self.record = replace(self.record, columns=columns.values, masks=columns.masks)
        return self.record


def _norm(values: NDArray[np.float64]) -> float:
    largest = float(np.max(values, initial=0.0))
    if not 0 < largest < np.inf:
        return float(values.sum())
    return largest * float(np.sqrt(np.sum((values / largest) ** 2)))
