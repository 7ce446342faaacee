"""Runs the treatments and actions of one step, in their right order, and never fails open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._closing import end_all
from ..protocols import Action, Hooks, Treatment
from ..records import Finding, Incident, TreatmentReport
from ..rules import Fired, RuleBook, treatments_of
from ..stats import Gradients
from ..torchside import moved, wide_dtype
from ..treatments import sort_treatments
from ._context import Decision, StepContext
from ._guard import Guard

__all__ = [
    "Applied",
    "Job",
    "alarm_jobs",
    "attach",
    "load_treatments",
    "fired_jobs",
    "learning_jobs",
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


def attach(treatments: Sequence[Treatment], model: nn.Module, owner: object) -> list[Hooks]:
    """Show treatments the model, and put the hooks of those that act inside backward on it; return their handles.

    The treatments are the user's, and may outlive the owner: its hooks do not.
    """
    handles: list[Hooks] = []
    try:
        for treatment in treatments:
            treatment.bind(model)
            hooks = treatment.install(model)
            if hooks is not None:
                handles.append(hooks)
                finalize(owner, hooks.remove).atexit = False
    except BaseException:
        end_all(*(handle.remove for handle in handles))
        raise
    return handles


def load_treatments(
    treatments: Sequence[Treatment], saved: Sequence[Any], names: Sequence[str] | None, guard: Guard
) -> None:
    """Give treatments back what they remembered; names: of those that it is the memory of."""
    ours = [t.name for t in treatments]
    if saved and (len(saved) != len(ours) or (names is not None and list(names) != ours)):
        theirs = f"{len(saved)} treatments" if names is None or len(saved) != len(ours) else ", ".join(names)
        mine = f"{len(ours)}" if len(saved) != len(ours) else ", ".join(ours)
        guard.warn(
            f"the checkpoint holds the memory of {theirs}, this run has {mine}: they start "
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
        Job(t, rule.name, False) for rule in book.rules for t in treatments_of(rule) if t.learns and id(t) not in busy
    ]


def alarm_jobs(
    book: RuleBook,
    grads: Gradients,
    alarms: Mapping[str, float],
    limits: Mapping[str, float],
    *,
    loss: Tensor | None,
    excused: Tensor | None,
) -> list[Job]:
    """Return the treatments of rules that a norm above their alarm makes fire; whether they act falls on the device.

    Args:
        alarms, limits: of rules by name: above which norm treatments act, and what they bring it to.
        loss: of this step, on the device: one that is not finite is as bad as such a norm, where that is the alarm.
        excused: a 0-dim bool tensor: nothing is to act (a loss scaler drops the step by itself).
    """
    jobs = []
    for rule in book.rules:
        treatments = treatments_of(rule)
        if not treatments:
            continue
        if rule.name not in alarms:
            jobs += [Job(t, rule.name, False) for t in treatments if t.learns]
            continue
        alarm = alarms[rule.name]
        norm = grads.global_norm if tuple(rule.paths) == ("*",) else grads.select(rule.paths).global_norm
        # Written so that nan triggers too; an alarm of inf stands for "finite".
        if loss is not None and alarm == math.inf:
            # 0, or nan where the loss is not finite: two kernels, where asking for that takes seven.
            norm = norm + moved(loss, norm.device, norm.dtype) * 0
        trigger = ~(norm <= min(alarm, torch.finfo(norm.dtype).max))
        if excused is not None:
            trigger = trigger & ~excused
        jobs += [Job(t, rule.name, trigger, limits.get(rule.name)) for t in treatments]
    return jobs


@dataclass
class Applied:
    """What ran at one step, its numbers still on the device."""

    treatments: list[Treatment] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[dict[str, Tensor | float]] = field(default_factory=list)
    failures: list[tuple[Job, BaseException]] = field(default_factory=list)
    _reported: list[bool] = field(default_factory=list, repr=False)

    def settle(self, reports: Sequence[TreatmentReport], context: StepContext) -> tuple[TreatmentReport, ...]:
        """Tell treatments that keep count what the device decided, now that it is known."""
        settled = []
        treatments = [t for t, is_reported in zip(self.treatments, self._reported, strict=True) if is_reported]
        for treatment, report in zip(treatments, reports, strict=True):
            added = treatment.settle(_said(report), context)
            if added:
                report = replace(report, values={**report.values, **added})
            settled.append(report)
        return tuple(settled)

    @property
    def may_act(self) -> bool:
        """Whether anything ran whose effect, or failure, is to be told."""
        return bool(self.names or self.failures)

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
        self._reported = []
        for i, ((name, rule), numbers) in enumerate(zip(self.names, self.numbers, strict=True)):
            values = {k: float(host[f"treatment/{i}/{k}"] if isinstance(v, Tensor) else v) for k, v in numbers.items()}
            before, after = values.pop("before"), values.pop("after")
            triggered = values.pop("trigger", 1.0) != 0
            applied = values.pop("applied", 1.0) != 0 and triggered
            # One that runs at every step was not to run at this one, which a loss scaler drops.
            self._reported.append(bool(rule) or triggered)
            if not self._reported[-1]:
                continue
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
    """Apply treatments in the order that is right. One that raises is among the failures: the caller must veto.

    Args:
        remeasured: ids of treatments after which norms had to be measured anew, at earlier steps; added to.
    """
    applied = Applied()
    remeasured = set() if remeasured is None else remeasured
    for job in sort_treatments(jobs, of=lambda job: job.treatment):
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
        numbers: dict[str, Tensor | float]
        try:
            with torch.no_grad():
                numbers = {k: _number(k, v) for k, v in (treatment.apply_(grads, context) or {}).items()}
        except Exception as error:
            applied.failures.append((job, error))
            numbers = {"applied": 0.0}
            if id(treatment) in remeasured:
                # Of gradients in pieces all ranks measure together: those where it did not fail would wait.
                grads.touch()
        if not _is_ours(treatment):
            # It may have changed them in ways that nothing tells of (in place, by `.data`, by another `.grad`).
            grads.touch()
        if not grads.is_measured:
            remeasured.add(id(treatment))
        if job.trigger is False:
            continue
        if isinstance(job.trigger, Tensor):
            numbers["trigger"] = job.trigger.to(wide_dtype(job.trigger.device))
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


def _is_ours(treatment: Treatment) -> bool:
    return type(treatment).__module__.startswith("gradwatch.treatments.")


def _said(report: TreatmentReport) -> dict[str, float]:
    return {**report.values, "applied": float(report.applied)}


def _frozen(value: Tensor) -> Tensor:
    return value.detach().clone()


def _number(name: str, value: Any) -> Tensor | float:
    """Return what a treatment reports under a name; a tensor is known to be one number before it has arrived."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise TypeError(f"{name!r} of its report is not one real number: {value.dtype}, shape {tuple(value.shape)}")
    value = value.reshape(()) if isinstance(value, Tensor) else value
    return value.detach().to(wide_dtype(value.device), copy=True) if isinstance(value, Tensor) else float(value)
