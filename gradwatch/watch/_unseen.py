"""What gradwatch could not see: said, never shown as zero."""

from __future__ import annotations

from collections.abc import Sequence

from .._text import listed
from ..stats import kernel_faults
from ._announced import Announced
from ._coverage import FROZEN, IN_NO_OPTIMIZER, NO_GRADIENT, REPLACED, UNSEEN, coverage
from ._judge import Judge
from ._measurement import Measurement
from ._model_meter import ModelMeter

__all__ = ["unseen", "why_nothing"]

_MISSED = (
    "an optimizer stepped {} without `watch.step()`. Call `watch.step(loss=loss)` in its place, or "
    "`watch.after_backward(loss=loss)` before it and `watch.after_step()` after"
)
_REPLACED = (
    "replaced in the model, though an optimizer still holds the old: {}. Give it the new ones (`add_param_group`), or "
    "make it anew"
)


def unseen(meter: ModelMeter, judge: Judge, announced: Announced, measurements: Sequence[Measurement]) -> list[str]:
    """Return what could not be watched or judged, in sentences."""
    notes = kernel_faults() + _of_steps(meter, announced) + _of_paths(meter)
    if meter.watched.strange:
        notes.append("treatments do not act, since they would act on a part of the gradient")
    for measurement in measurements:
        notes += measurement.notes()
    coverage = judge.coverage
    failed = {c.name: c.reason for c in coverage if c.disabled}
    if failed:
        notes.append(f"rules that failed: {', '.join(f'{name} ({why})' for name, why in sorted(failed.items()))}")
    return notes


def why_nothing(meter: ModelMeter, announced: Announced) -> str:
    """Return why no step was measured, and what to do."""
    if announced.num_missed:
        return _MISSED.format(_times(announced.num_missed))
    if meter.account.num_inside:
        return "optimizers stepped inside backward alone. Step after backward, and call `watch.step()` there"
    return "no optimizer that is known has stepped. Is it the one that was given to gradwatch?"


def _of_steps(meter: ModelMeter, announced: Announced) -> list[str]:
    blanks, total = meter.account.blanks, meter.account.num_steps
    notes = [f"no gradient was seen at {count} of {total} steps: {why}" for why, count in blanks.items()]
    if announced.num_missed and total:
        notes.append(f"not measured: {_MISSED.format(_times(announced.num_missed))}")
    return notes


def _of_paths(meter: ModelMeter) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for path, (state, reason) in coverage(meter).items():
        if state == REPLACED:
            groups.setdefault((REPLACED, ""), []).append(path.removeprefix("<optimizer>."))
        elif state in (UNSEEN, IN_NO_OPTIMIZER) or _never_had_one(meter, path, state, reason):
            groups.setdefault((state, reason), []).append(path)
    notes = []
    for (state, reason), paths in groups.items():
        if state == IN_NO_OPTIMIZER:
            notes.append(f"trainable, but in no optimizer: {listed(paths)}")
        elif state == REPLACED:
            notes.append(_REPLACED.format(listed(paths)))
        else:
            notes.append(f"{listed(paths)}: {reason}")
    return notes


def _never_had_one(meter: ModelMeter, path: str, state: str, reason: str) -> bool:
    # A branch that is used at some steps only is healthy, and no news.
    return state == NO_GRADIENT and reason != FROZEN and path in meter.account.never and not meter.account.blanks


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
