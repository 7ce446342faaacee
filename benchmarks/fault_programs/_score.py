"""What runs come to: rates of detection and false alarm, by program and by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ._diagnoses import is_diagnosed
from ._program import Program
from ._training import Run

__all__ = ["PEERS", "Score", "manifests", "score"]

PEERS: tuple[tuple[str, float, float], ...] = (
    ("SageMaker Debugger core rules", 0.65, 0.25),
    ("AutoTrainer (sees accuracy)", 0.75, 0.14),
    ("DeepDiagnosis", 0.75, 0.50),
    ("trainpulse 0.4.0", 0.87, 0.70),
    ("non-finite, not learning, constant output", 0.59, 0.00),
)
"""Other rule sets, re-run on these programs with their own thresholds: name, TPR, FPR on fixed twins."""


def manifests(faulty: Run, fixed: Run) -> bool:
    """Return whether the fault shows: a worse metric by more than max(.05, 10 %), or anything that is not finite."""
    return not faulty.is_finite or fixed.metric - faulty.metric > max(0.05, 0.1 * abs(fixed.metric))


@dataclass(frozen=True)
class Score:
    """Rates over runs.

    Attributes:
        num_manifest: faulty runs whose fault showed.
        tpr: share of them with an alarm (an incident of severity warning or above).
        fpr: share of the fixed twins' runs with one.
        control_alarms: the same over healthy controls, as a number of runs.
        num_controls: runs of healthy controls.
        diagnosed: share of the detected whose incidents name the fault.
        hits, false_alarms: rule -> runs in which it alarmed, rightly and wrongly.
        missed: manifest runs without an alarm.
        undiagnosed: detected runs whose incidents name no fault of the program.
    """

    num_manifest: int
    tpr: float
    fpr: float
    control_alarms: int
    num_controls: int
    diagnosed: float
    hits: Mapping[str, int] = field(default_factory=dict)
    false_alarms: Mapping[str, int] = field(default_factory=dict)
    missed: Sequence[Run] = ()
    undiagnosed: Sequence[Run] = ()

    @property
    def balanced_accuracy(self) -> float:
        return (self.tpr + 1 - self.fpr) / 2


def score(programs: Iterable[Program], runs: Mapping[tuple[str, int, bool], Run]) -> Score:
    """Return the rates over all runs, keyed by program, seed and whether the faulty twin ran."""
    faults = {p.name: p.faults for p in programs}
    manifest = [run for (name, seed, faulty), run in runs.items() if faulty and manifests(run, runs[name, seed, False])]
    detected = [run for run in manifest if run.alarms]
    named = [run for run in detected if is_diagnosed(faults[run.program], {**run.alarms, **run.remarks})]
    fixed = [run for (name, _, faulty), run in runs.items() if not faulty and faults[name]]
    controls = [run for (name, _, _), run in runs.items() if not faults[name]]
    return Score(
        num_manifest=len(manifest),
        tpr=_share(len(detected), len(manifest)),
        fpr=_share(sum(bool(run.alarms) for run in fixed), len(fixed)),
        control_alarms=sum(bool(run.alarms) for run in controls),
        num_controls=len(controls),
        diagnosed=_share(len(named), len(detected)),
        hits=Counter(rule for run in manifest for rule in run.alarms),
        false_alarms=Counter(rule for run in fixed + controls for rule in run.alarms),
        missed=[run for run in manifest if not run.alarms],
        undiagnosed=[run for run in detected if run not in named],
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
