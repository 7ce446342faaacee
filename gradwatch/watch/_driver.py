"""Runs the treatments and actions of one step, in their right order, and never fails open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..protocols import Action, Treatment
from ..records import Finding, Incident, TreatmentReport
from ..rules import Fired, RuleBook
from ..stats import Gradients
from ._context import Decision, StepContext
from ._guard import Guard

__all__ = [
    "Applied",
    "Job",
    "attach",
    "load_treatments",
    "fired_jobs",
    "learning_jobs",
    "limit_jobs",
    "run_actions",
    "run_treatments",
]


@dataclass
class Job:
    """One treatment to run: on every step, or because a rule fired (or may fire, by its limit)."""

    treatment: Treatment
    rule: str = ""
    trigger: Any = True
    limit: float | None = None
    findings: Sequence[Finding] = ()


def attach(treatments: Sequence[Any], model: nn.Module) -> list[Any]:
    """Show treatments the model, and put the hooks of those that act inside backward on it; return their handles."""
    handles = []
    for treatment in treatments:
        if hasattr(treatment, "bind"):
            treatment.bind(model)
        if getattr(treatment, "at", "grad") == "grad_output":
            handles.append(treatment.install(model))
    return handles


def load_treatments(treatments: Sequence[Treatment], saved: Sequence[Any], guard: Guard) -> None:
    """Give treatments back what they remembered."""
    if saved and len(saved) != len(treatments):
        guard.warn(
            f"the checkpoint holds the memory of {len(saved)} treatments, this run has {len(treatments)}: they start "
            "afresh. Resume with the same treatments to go on where they were."
        )
        return
    for treatment, memory in zip(treatments, saved, strict=False):
        treatment.load_state_dict(memory)


def fired_jobs(fired: Fired, limit: float | None) -> list[Job]:
    """Return the treatments of a rule that was seen to fire."""
    return [Job(t, fired.rule.name, True, limit, fired.findings) for t in fired.then if isinstance(t, Treatment)]


def learning_jobs(book: RuleBook, fired: Sequence[Fired]) -> list[Job]:
    """Return the treatments that learn from every step (ZClip, ...) of rules that did not fire: they look on."""
    busy = {id(t) for f in fired for t in f.then}
    return [
        Job(t, rule.name, False)
        for rule in book.rules
        for t in rule.then
        if getattr(t, "learns", False) and id(t) not in busy
    ]


def limit_jobs(book: RuleBook, grads: Gradients, limits: Mapping[str, float]) -> list[Job]:
    """Return the treatments of all rules that have a limit; whether they act falls on the device."""
    jobs = []
    for rule in book.rules:
        if rule.name in limits:
            limit = limits[rule.name]
            # Written so that nan triggers too; a limit of inf stands for "finite".
            bound = min(limit, torch.finfo(torch.float64).max)
            trigger = ~(grads.global_norm <= bound)
            jobs += [Job(t, rule.name, trigger, limit) for t in rule.then if isinstance(t, Treatment)]
    return jobs


@dataclass
class Applied:
    """What ran at one step, its numbers still on the device."""

    treatments: list[Treatment] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[dict[str, Tensor | float]] = field(default_factory=list)
    failures: list[tuple[Job, BaseException]] = field(default_factory=list)

    def settle(self, reports: Sequence[TreatmentReport], context: StepContext) -> tuple[TreatmentReport, ...]:
        """Tell treatments that keep count what the device decided, now that it is known."""
        settled = []
        for treatment, report in zip(self.treatments, reports, strict=True):
            if hasattr(treatment, "settle"):
                report = replace(report, values={**report.values, **treatment.settle(_said(report), context)})
            settled.append(report)
        return tuple(settled)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors among the numbers, for the step's packed copy."""
        return {
            f"treatment/{i}/{name}": value
            for i, numbers in enumerate(self.numbers)
            for name, value in numbers.items()
            if isinstance(value, Tensor)
        }

    def reports(self, host: dict[str, Any]) -> tuple[TreatmentReport, ...]:
        """Return the reports, with the tensors' values taken from the host's copy."""
        reports = []
        for i, ((name, rule), numbers) in enumerate(zip(self.names, self.numbers, strict=True)):
            values = {k: float(host[f"treatment/{i}/{k}"] if isinstance(v, Tensor) else v) for k, v in numbers.items()}
            before, after = values.pop("before"), values.pop("after")
            applied = values.pop("applied", 1.0) != 0 and values.pop("trigger", 1.0) != 0
            reports.append(
                TreatmentReport(name=name, rule=rule, before=before, after=after, applied=applied, values=values)
            )
        return tuple(reports)


def run_treatments(
    jobs: Sequence[Job],
    grads: Gradients,
    *,
    step: int,
    optimizers: Sequence[Optimizer],
    decision: Decision,
    can_read: bool,
    remeasured: set[int] | None = None,
) -> Applied:
    """Apply treatments in the order that is right (C9). One that raises is among the failures: the caller must veto.

    Args:
        remeasured: ids of treatments after which norms had to be measured anew, at earlier steps; added to.
    """
    applied = Applied()
    remeasured = set() if remeasured is None else remeasured
    for job in sorted(jobs, key=lambda job: getattr(job.treatment, "order", 50)):
        treatment = job.treatment
        context = StepContext(
            step=step,
            optimizers=optimizers,
            decision=decision,
            rule=job.rule,
            trigger=job.trigger,
            limit=job.limit,
            findings=job.findings,
            can_read=can_read,
            is_treatment=True,
        )
        before = _frozen(grads.global_norm)
        try:
            with torch.no_grad():
                said = treatment.apply_(grads, context) or {}
        except Exception as error:
            applied.failures.append((job, error))
            if id(treatment) in remeasured:
                # Of gradients in pieces all ranks measure together: those where it did not fail would wait.
                grads.touch()
            said = {"applied": 0.0}
        if not grads.is_measured:
            remeasured.add(id(treatment))
        if job.trigger is False:
            continue
        numbers: dict[str, Tensor | float] = {k: _number(v) for k, v in said.items()}
        if isinstance(job.trigger, Tensor):
            numbers["trigger"] = job.trigger.to(torch.float64)
        applied.treatments.append(treatment)
        applied.names.append((treatment.name, job.rule))
        applied.numbers.append({"before": before, "after": _frozen(grads.global_norm), **numbers})
    return applied


def run_actions(
    actions: Sequence[tuple[Action, Incident]], *, step: int, optimizers: Sequence[Optimizer], decision: Decision
) -> list[tuple[Action, BaseException]]:
    """Let actions ask what they ask of the trainer; return those that failed."""
    failures: list[tuple[Action, BaseException]] = []
    for action, incident in actions:
        context = StepContext(step=step, optimizers=optimizers, decision=decision, rule=incident.name)
        try:
            action.act(incident, context)
        except Exception as error:
            failures.append((action, error))
    return failures


def _said(report: TreatmentReport) -> dict[str, float]:
    return {**report.values, "applied": float(report.applied)}


def _frozen(value: Tensor) -> Tensor:
    return value.detach().clone()


def _number(value: Any) -> Tensor | float:
    return value.detach().to(torch.float64).clone() if isinstance(value, Tensor) else float(value)
