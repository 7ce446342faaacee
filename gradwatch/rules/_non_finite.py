"""NaN and infinity, wherever they show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..records import Bools, StepRecord
from ._block import Block, Passed
from ._findings import Findings
from ._rule import Rule, State
from ._selection import first_in_order, leaf_first, select

__all__ = ["NonFinite"]

_COUNTS = ("nonfinite_count", "output_nonfinite", "grad_output_nonfinite")
_NORMS = ("grad_norm",)


class NonFinite(Rule):
    """Flags a loss or gradient that is NaN or infinite, and says where it was born.

    Activations tell where. One alone is no finding where the loss and every gradient of its step are finite: what is
    infinite by design, as an attention mask is, does no harm.

    A gradient norm is finite only if every element is. Steps that a GradScaler found to overflow, and skips, are its
    way of working: their gradients are flagged only when the scale is down at `scale_floor`, or after more than
    `max_overflows` such steps running; a loss that is non-finite is flagged always.

    An incident begins at the first module in forward order whose output is bad while its input is not, where
    activations were sampled; else, where the loss or every gradient is bad, at the first parameter; else at the first
    parameter in backward order, next to where the bad gradient was born.

    Its treatments act on a loss or gradient only, never on an activation alone.

    Args:
        scale_floor: loss scale at which overflow is no longer a matter of scale.
        max_overflows: overflowing steps running that are in order.
    """

    scale_floor: float = 1.0
    max_overflows: int = 5
    severity: str = "critical"
    advice: str = (
        "Usually log or sqrt of 0, a division by 0, exp of a large number, a bad value in the data, or a learning "
        "rate far too high. Look for the first bad module and its input; clamp or add an epsilon there; check the "
        "batch for NaN; lower the learning rate; skip such steps (`then: [skip_step]`)."
    )
    inhibit_for: int = 50

    enough = 20
    needs = frozenset({"grad_norm", "nonfinite_count", "output_nonfinite", "input_nonfinite", "grad_output_nonfinite"})
    order = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("scale_floor", self.scale_floor >= 0, 0)
        self._require("max_overflows", self.max_overflows >= 0, 0)

    def init(self) -> State:
        return {"overflows": 0}

    def limit(self, state: State) -> float | None:
        """Return infinity: any finite norm is accepted."""
        return math.inf

    def judge(self, record: StepRecord, state: State) -> tuple[Findings, State]:
        overflow = record.scalars.get("amp_overflow", 0.0) > 0
        overflows = state["overflows"] + 1 if overflow else 0
        if overflows != state["overflows"]:
            state = {"overflows": overflows}
        excused = overflow and overflows <= self.max_overflows
        excused = excused and record.scalars.get("grad_scale", math.inf) > self.scale_floor
        return self._findings(record, excused), state

    def acts(self, record: StepRecord) -> bool:
        """Return whether the loss or a gradient is not finite: an activation may be infinite by design (a mask)."""
        if record.has_loss and not math.isfinite(record.loss):
            return True
        norms = record.columns.get("grad_norm")
        in_norms = norms is not None and bool((self._bad("grad_norm", record) & self._chosen(record)).any())
        return in_norms or math.isinf(record.global_norm)

    def _chosen(self, record: StepRecord) -> Bools:
        return select(record.index, self.paths, "any")

    def pass_over(self, block: Block, state: State) -> Passed | None:
        if state["overflows"] or any(o > 0 for o in block.scalar("amp_overflow")):
            return None
        if any(map(math.isinf, block.norms)) or any(r.has_loss and not math.isfinite(r.loss) for r in block.records):
            return None
        for name in (*_NORMS, *_COUNTS):
            if name in block.names and any(name in r.columns and self._bad(name, r).any() for r in block.records):
                return None
        return Passed(state, len(block))

    def _findings(self, record: StepRecord, excused: bool) -> Findings:
        chosen = self._chosen(record)
        bad = np.zeros(len(record.index), np.bool_)
        values = np.full(len(record.index), np.nan)
        for name in () if excused else (*_NORMS, *_COUNTS):
            column = record.columns.get(name)
            if column is None:
                continue
            shown = self._bad(name, record) & chosen
            if shown.any():
                values[shown & ~bad] = column[shown & ~bad]
                bad |= shown
        in_loss = record.has_loss and not math.isfinite(record.loss)
        in_norm = not excused and not bad.any() and math.isinf(record.global_norm)
        positions = np.flatnonzero(bad)
        found = values[bad]
        if in_loss or in_norm:
            positions = np.append(positions, len(record.index))
            found = np.append(found, record.loss if in_loss else record.global_norm)
        if not len(positions) or (record.has_loss and record.has_gradient and not excused and not self.acts(record)):
            return self.clear(record)
        what = "the loss" if in_loss else f"{int(bad.sum())} paths" if bad.any() else "the global norm"
        return Findings(self, record, positions, found, np.zeros(len(found)), text=f"NaN or infinity in {what}")

    @staticmethod
    def _bad(name: str, record: StepRecord) -> Bools:
        column = record.columns[name]
        bad: Bools = ~np.isfinite(column) if name in _NORMS else column > 0
        return bad & record.measured(name) if bad.any() else bad

    def first_path(self, record: StepRecord, positions: Any) -> str:
        index = record.index
        outputs = self._positions("output_nonfinite", record)
        if len(outputs):
            poisoned = self._positions("input_nonfinite", record)
            born = np.setdiff1d(outputs, poisoned)
            return leaf_first(index, born if len(born) else outputs)
        grads = self._positions("grad_norm", record)
        grad_outputs = self._positions("grad_output_nonfinite", record)
        everywhere = len(grads) == int(record.measured("grad_norm").sum())
        if (record.has_loss and not math.isfinite(record.loss)) or (len(grads) and everywhere):
            return first_in_order(index, positions, "forward")
        return first_in_order(index, grad_outputs if len(grad_outputs) else positions, "backward")

    def _positions(self, name: str, record: StepRecord) -> Any:
        return np.flatnonzero(self._bad(name, record)) if name in record.columns else np.zeros(0, np.int64)
