"""A step whose numbers are still on their way, and the record that it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..protocols import Action
from ..records import Finding, Histogram, HistogramTable, Incident, Index, StepRecord
from ..requests import StopTraining
from ._accord import Layout
from ._account import MOVED, NO_BACKWARD
from ._between import Between, whole
from ._columns import Columns, as_float32
from ._device_veto import LateProof
from ._ranks import merged_extras
from ._run_treatments import Applied
from ._tables import TablesDraft
from ._transfer import Numbers

__all__ = ["NOTHING", "Draft", "share_columns"]

NOTHING: Mapping[str, str] = MappingProxyType({})

# Absent where a batch could not tell it; every other nan is a measurement.
_OF_GRADIENTS = ("details_sums", "details_maxima", "histograms", "own/sums", "own/maxima")
"""Numbers that have a row for each gradient, norms apart."""
_ABSENT_AS_NAN = frozenset(
    {
        "output_batch_variance",
        "target_tail",
        "baseline_loss",
        "binary_baseline",
        "binary_least",
        *(f"binary_cross_entropy{n}" for n in ("", "_twice")),
        *(f"cross_entropy{n}" for n in ("", "_of_probabilities", "_over_batch", "_twice", "_shifted")),
    }
)


class Draft:
    """One step between its measurement and its record. Holds no gradient, no batch and no graph.

    Attributes:
        positions: in the index, of the parameters that had a gradient.
        numbers: what was measured before treatment, on its way to the host.
        optimizer: which of several that step each on its own.
        is_plain: these are norms, loss and number of samples, and no more.
        scalars: what is known on the host already.
        tap: turns the modules' sums into columns; None on steps without samples.
        loss_scale: of the loss scaler, that the gradients inside backward carry.
        extras: names of the scalars that are means over what each rank knew for itself.
        loss: on the device; None where none was given, or the host knows it.
        failed: on how many ranks this step could not be measured, on the device; None where there is one rank.
        num_ranks: of the run.
        num_batches: how many ranks work on batches of their own; the loss of the whole is the mean of theirs.
        tap_positions: in the index, of the modules.
        has_details: histograms were taken, or what rules have long waited for.
        layout: what its model looked like to this rank (see `Accord`); None where there is one rank.
        own: the user's own statistics of this step; None where there are none.
        tables: statistics with tables of their own, likewise.
        applied, treated: the treatments that ran, and their numbers on the way.
        unseen: path -> why neither a gradient was measured nor is known not to be.
        doubtful: which of the measured gradients were used up inside backward if they are zero.
        is_without_backward: no backward ran: gradients of zero are what was left of the last step.
        spanning, updates: what was measured of the optimizers' step, and its numbers on the way.
        between: tells a clip ahead of the measurement, with what it was told of earlier steps.
        is_sealed: nothing showed that gradients were changed since backward, and they were measured again all the same.
        met: the global norm after such a clip; None where there was none.
        clipper: see `StepInputs`.
        proofs: of the veto that was decided on the device, on their way.
        delivered: the norm that the optimizer got, on its way; None where it was not measured.
        is_as_left: no gradient was seen to change between gradwatch and the optimizer's step; None: no step was seen.
        judged: the rules that can act in the step itself have judged it.
        is_current: the optimizer has not stepped yet.
        is_half_done: its record is being made; what Ctrl-C stopped is begun again.
        is_kept: its record was handed on.
        is_ordinary: nothing in it is unusual; None until somebody has looked.
        columns: of the record, made for a stretch of plain steps at once; None: made by `build`.
        actions: of rules that fired, with their incidents; they ask when treatments have run.
        record: once the numbers have arrived.
        findings: of the rules that have judged it.
    """

    step: int
    index: Index
    when: float
    epoch: int
    batch_idx: int
    lr: float
    scaler: bool
    positions: NDArray[np.int64]
    numbers: Numbers
    scalars: dict[str, float]
    is_plain = False
    optimizer = 0
    tap: Any = None
    loss_scale = 1.0
    extras: tuple[str, ...] = ()
    failed: Tensor | None = None
    loss: Tensor | None = None
    num_ranks = 1
    num_batches = 1
    tap_positions: NDArray[np.int64] | None = None
    has_details = False
    layout: Layout | None = None
    own: Any = None
    tables: TablesDraft | None = None
    applied: Applied | None = None
    treated: Numbers | None = None
    unseen: Mapping[str, str] = NOTHING
    doubtful: tuple[int, ...] = ()
    is_without_backward = False
    spanning: TablesDraft | None = None
    updates: Numbers | None = None
    between: Between | None = None
    is_sealed = False
    met: float | None = None
    clipper = ""
    proofs: tuple[LateProof, ...] = ()
    delivered: Numbers | None = None
    is_as_left: bool | None = None
    vetoed = False
    judged = False
    is_current = True
    is_half_done = False
    is_kept = False
    is_ordinary: bool | None = None
    columns: Columns | None = None
    actions: Sequence[tuple[Action, Incident]] = ()
    record: StepRecord | None = None
    findings: Sequence[Finding] = ()

    def __init__(self, **known: Any) -> None:
        # At most steps few of these are anything but what stands above.
        vars(self).update(known)

    @property
    def ready(self) -> bool:
        """Whether every number has arrived on the host."""
        return (
            self.numbers.ready
            and (self.treated is None or self.treated.ready)
            and (self.updates is None or self.updates.ready)
            and (self.delivered is None or self.delivered.ready)
            and all(proof.ready for proof in self.proofs)
        )

    def add_proof(self, proof: LateProof) -> None:
        """Take the proof of a veto that the device decided."""
        self.proofs = (*self.proofs, proof)

    @property
    def is_sampled(self) -> bool:
        """Whether more was measured than norms, for rules that have long waited for it."""
        return self.tap is not None or self.updates is not None or self.has_details

    def look(self, calm: float, loss_limit: float) -> bool:
        """Return whether numbers that have arrived tell nothing that can't wait: finite ones, and no larger than that.

        Args:
            calm: global norm in which no rule finds anything.
            loss_limit: the largest loss that is no surprise.
        """
        host = self.numbers.result()
        loss, norm = host.get("loss"), float(host["global_norm"])
        if type(loss) is not float:
            loss = _mean(loss)
        if "produced" in host:
            norm = float(np.maximum(norm, whole(host["produced"])))
        if self.num_ranks > 1 and self.out_of_step():
            return False
        return norm <= calm and math.isfinite(norm) and (loss is None or loss <= loss_limit)

    def build(self, norms: NDArray[np.float64] | None = None) -> StepRecord:
        """Make the record of what was measured before treatment.

        Args:
            norms: gradient norms after a second look; the measured ones where None.
        """
        host = self.numbers.result()
        global_norm = float(host["global_norm"])
        if norms is not None or not 1e-140 < global_norm < 1e140:
            # Squares may have left float64.
            global_norm = whole(host["norms"] if norms is None else norms)
        host, norms, positions = self._present(host, host["norms"] if norms is None else norms)
        columns, before = self.columns, self._before(host, norms)
        if before is not None:
            self.met, norms, columns = global_norm, before, None
            global_norm = whole(before)
        if columns is None:
            columns = Columns(len(self.index))
            columns.put("grad_norm", positions, norms)
        histograms = {} if self.is_plain else self._put_measured(host, columns, positions)
        told = {} if self.tables is None else self.tables.put(host, columns)
        has_gradient = self._cross_out(columns, norms, global_norm)
        global_norm = global_norm if has_gradient else math.nan
        overflow = self.scaler and has_gradient and not math.isfinite(global_norm)
        kept = self._named(host, columns, positions, told, overflow)
        loss = _mean(host.get("loss"))
        if not (self.is_current or overflow or self.vetoed) and self.treated is None and has_gradient:
            # The step is over and nothing was done to it: all is known, and the record need not be made twice.
            applied = self._applied(global_norm if self.met is None else self.met)
            kept |= {} if applied is None else {"global_norm_applied": applied}
        self.record = StepRecord(
            step=self.step,
            index=self.index,
            epoch=self.epoch,
            batch_idx=self.batch_idx,
            num_samples=self._num_samples(host),
            time=self.when,
            loss=math.nan if loss is None else loss,
            has_loss=loss is not None,
            lr=self.lr,
            global_norm=global_norm,
            global_norm_after=global_norm,
            columns=columns.values,
            masks=columns.masks,
            scalars=kept,
            histograms=histograms,
            skipped=overflow,
            has_gradient=has_gradient,
            unseen=self.unseen,
        )
        return self.record

    def _num_samples(self, host: Mapping[str, Any]) -> int:
        """Return how many samples the step had; in a pipeline not all ranks of it need know."""
        said = int(host["counted"]) if "counted" in host else self.num_ranks
        return int(host["samples"]) * self.num_batches // max(said, 1)

    def _put_measured(
        self, host: dict[str, Any], columns: Columns, positions: NDArray[np.int64]
    ) -> Mapping[str, Histogram]:
        """Put what was measured besides norms into the columns; return the histograms."""
        histograms: Mapping[str, Histogram] = {}
        if "details_sums" in host:
            counts = host["histograms"].astype(np.int64, copy=False)
            columns.put_details(positions, host, counts)
            columns.put_underflow(positions, counts)
            histograms = HistogramTable([self.index.paths[i] for i in positions], counts)
        if self.tap is not None and self.tap_positions is not None:
            found = self.tap.to_columns(
                host["tap_sums"], host["tap_maxima"], grad_scale=self.loss_scale * self.num_batches
            )
            columns.put_modules(self.tap_positions, *found)
        return histograms

    def _named(
        self,
        host: dict[str, Any],
        columns: Columns,
        positions: NDArray[np.int64],
        told: Mapping[str, float],
        overflow: bool,
    ) -> dict[str, float]:
        """Return the numbers that have a name of their own; those of the user's go into the columns, too.

        Args:
            told: of statistics with tables of their own.
        """
        scalars = self.scalars
        if not self.is_plain:
            scalars = scalars | {k[6:]: float(np.sum(v)) for k, v in host.items() if k.startswith("batch/")}
            scalars |= told
            if "extras" in host:
                scalars |= merged_extras(self.extras, host["extras"], self.num_ranks)
        if self.own is not None:
            self.own.put(host, columns, scalars, positions)
        if self.scaler:
            scalars = {**scalars, "amp_overflow": float(overflow)}
        return {k: v for k, v in scalars.items() if not (math.isnan(v) and k in _ABSENT_AS_NAN)}

    def _before(self, host: dict[str, Any], norms: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return the norms before a clip ahead of the measurement; None where there was none."""
        before = host.get("produced")
        if before is None or self.between is None:
            return None
        if self.is_sealed:
            self.between.compare(before, norms)
        return before if self.between.is_clip(before, norms, num_ranks=self.num_ranks) else None

    def _cross_out(self, columns: Columns, norms: NDArray[np.float64], global_norm: float) -> bool:
        """Take gradients off the record that are zero because they were used up; return whether any is left."""
        if not len(norms) and len(self.positions):
            self.unseen = {**self.unseen, "": NO_BACKWARD}
            return False
        known = len(norms) == len(self.positions)  # else some turned out to be on no rank
        used = [i for i in self.doubtful if known and norms[i] == 0]
        if used:
            places = self.positions[used].tolist()
            self.unseen = {**self.unseen, **{self.index.paths[place]: MOVED for place in places}}
            for mask in columns.masks.values():
                mask[places] = False
        if self.is_without_backward and global_norm == 0:
            self.unseen = {"": NO_BACKWARD}
            return False
        return len(used) < len(self.positions)

    def _present(
        self, host: dict[str, Any], norms: NDArray[np.float64]
    ) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.int64]]:
        """Return numbers, norms and places in the index without the gradients that turned out to be on no rank."""
        absent = host.get("absent")
        if absent is None or not absent.any():
            return host, norms, self.positions
        here = absent == 0
        host = host | {name: host[name][here] for name in _OF_GRADIENTS if name in host}
        return host, norms[here], self.positions[here]

    @property
    def num_failed(self) -> int:
        """On how many ranks this step could not be measured."""
        return int(self.numbers.result().get("failed", 0))

    def out_of_step(self) -> list[StopTraining]:
        """Ask for a stop where a treatment failed at the step before on some ranks only: their weights differ since; or
        where a vetoed step moved something on any, and that is to end the training."""
        host = self.numbers.result()
        unproven, count = int(host.get("unproven", 0)), int(host.get("treatments_failed", 0))
        if unproven:
            reason = (
                f"a step before step {self.step} was vetoed, and it can't be proven on {unproven} of {self.num_ranks} "
                "ranks that nothing moved: their incidents say what did."
            )
            return [StopTraining(reason=reason, as_error=True)]
        if not 0 < count < self.num_ranks:
            return []
        reason = (
            f"a treatment, or a rule that carries one, failed on {count} of {self.num_ranks} ranks before step "
            f"{self.step}: these did not do what the others did, and weights may differ between ranks. Resume from the "
            "last checkpoint."
        )
        return [StopTraining(reason=reason, as_error=True)]

    def add_treatments(self) -> StepRecord:
        """Put what the treatments did into the record."""
        assert self.record is not None
        host = {} if self.treated is None else self.treated.result()
        if "veto" in host:
            self.vetoed = bool(host["veto"])
        names = () if self.applied is None else self.applied.names
        if not (names or self.vetoed or self.met is not None):
            return self.record
        after = self.record.global_norm if self.met is None else self.met
        if names:
            after = float(host["global_norm_after"])
        self.record = replace(
            self.record,
            treatments=() if self.applied is None else self.applied.reports(host),
            global_norm_after=after,
            skipped=self.vetoed or self.record.skipped,
        )
        return self.record

    def add_delivered(self) -> StepRecord:
        """Put the norm that the optimizer got into the record; none where it did not move, or nobody knows."""
        record = self.record
        assert record is not None
        if record.skipped or not record.has_gradient or "global_norm_applied" in record.scalars:
            return record
        applied = self._applied(record.global_norm_after)
        if applied is not None:
            record = self.record = replace(record, scalars={**record.scalars, "global_norm_applied": applied})
        return record

    def _applied(self, after: float) -> float | None:
        """Return the norm that the optimizer got, where gradwatch left that of `after`; None where nobody knows."""
        applied = math.nan if self.delivered is None else float(self.delivered.result()["applied"])
        if self.is_as_left and not 1e-140 < applied < 1e140:
            return after  # not measured, or squares have left float64
        return None if self.delivered is None else applied

    def add_updates(self) -> StepRecord:
        """Put what the optimizers' step did into the record, where it was measured and the step was taken."""
        record = self.record
        assert record is not None
        if self.updates is None or self.spanning is None or record.skipped:
            return record
        columns = Columns(len(self.index), dict(record.columns), dict(record.masks))
        known = {"measured": record.measured("grad_norm")} if "absent" in self.numbers.result() else {}
        scalars = {**record.scalars, **self.spanning.put(self.updates.result(), columns, **known)}
        self.record = replace(record, columns=columns.values, masks=columns.masks, scalars=scalars)
        return self.record


def share_columns(drafts: Sequence[Draft]) -> None:
    """Make the columns of plain steps, a stretch of them at once: norms of the same parameters, rounded together."""
    stretch: list[Draft] = []
    for draft in (*drafts, None):
        first = stretch[0] if stretch else None
        if first is not None and not (draft is not None and _is_alike(first, draft)):
            _share(stretch)
            stretch = []
        if draft is not None and draft.is_plain and draft.record is None and not draft.doubtful:
            stretch.append(draft)


def _is_alike(one: Draft, other: Draft) -> bool:
    return other.is_plain and other.index is one.index and other.positions is one.positions


def _share(drafts: Sequence[Draft]) -> None:
    index, positions = drafts[0].index, drafts[0].positions
    rows = np.full((len(drafts), len(index)), np.nan)
    mask = np.zeros(len(index), np.bool_)
    mask[positions] = True
    rows[:, positions] = as_float32(np.stack([draft.numbers.result()["norms"] for draft in drafts]))
    for draft, row in zip(drafts, rows, strict=True):
        draft.columns = Columns(len(index), {"grad_norm": row}, {"grad_norm": mask})


def _mean(loss: Any) -> float | None:
    """Return the mean of the losses, given as such or, over ranks, as sum and number; None where there was none."""
    if loss is None or type(loss) is float:
        return loss
    if not np.ndim(loss):
        return float(loss)
    return float(loss[0] / loss[1]) if loss[1] else None
