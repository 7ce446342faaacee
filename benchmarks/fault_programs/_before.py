"""The programs before their first step: what the pre-flight checks find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradwatch import preflight

from ._program import Program
from ._training import batches

__all__ = ["BY_CONSTRUCTION", "Checked", "check_all"]

BY_CONSTRUCTION = frozenset(
    {
        "vanishing",
        "exploding",
        "dead",
        "hidden_activation",
        "initialisation",
        "symmetry",
        "regularisation",
        "output_activation",
        "softmax_on_one_unit",
        "wrong_loss",
        "loss_sign",
        "loss_reduction",
        "log_of_zero",
        "shape_broadcast",
        "unnormalised_input",
        "tiny_input",
        "unscaled_targets",
        "frozen",
        "stale_optimizer",
        "detached",
    }
)
"""Faults that are there before the first step: of the model, loss, data or optimizer, not of rates or the loop."""


@dataclass(frozen=True)
class Checked:
    """The checks' word on one program."""

    program: Program
    faulty: bool
    seed: int
    found: tuple[str, ...]
    seconds: float

    @property
    def is_by_construction(self) -> bool:
        return self.faulty and bool(BY_CONSTRUCTION & set(self.program.faults))


def check_all(programs: Iterable[Program], seeds: Sequence[int]) -> list[Checked]:
    """Check both twins of every program with the first batch of its training. Loops of their own are left out."""
    checked = []
    for program in programs:
        for seed in seeds:
            for faulty in (False,) if program.is_control else (True, False):
                problem = program.make(seed, faulty=faulty)
                if problem.fit is not None:
                    continue
                optimizer = problem.optimizer(problem.model)
                if problem.schedule:
                    problem.schedule(optimizer)
                report = preflight(problem.model, next(batches(problem, seed)), problem.loss, optimizer)
                found = tuple(dict.fromkeys(finding.check for finding in report.alarms))
                checked.append(Checked(program, faulty, seed, found, report.seconds))
    return checked
