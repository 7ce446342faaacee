"""Run the checks, and leave everything as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, UnknownNameError
from . import _batch, _loss_lab, _outputs, _parameters, _places, _signal
from ._report import PreflightFinding, PreflightReport
from ._snapshot import same_randomness, unchanged
from ._task import Task
from ._trace import Trace, trace
from ._trial import Check, NotChecked, Trial, weight_shaped

__all__ = ["CHECKS", "preflight"]

CHECKS: dict[str, Check] = {
    "trainable": _parameters.trainable,
    "finite": _signal.finite,
    "frozen": _parameters.frozen,
    "without_gradient": _parameters.without_gradient,
    "held_by_optimizer": _parameters.held_by_optimizer,
    "learning_rate": _parameters.learning_rate,
    "symmetric_rows": _parameters.symmetric_rows,
    "dead_weights": _parameters.dead_weights,
    "unnormalised_inputs": _outputs.unnormalised_inputs,
    "repeated_rows": _places.repeated_rows,
    "constant_targets": _outputs.constant_targets,
    "output_shape": _outputs.output_shape,
    "output_units": _outputs.output_units,
    "output_range": _outputs.output_range,
    "signal_propagation": _signal.signal_propagation,
    "gradient_propagation": _signal.gradient_propagation,
    "initial_scale": _signal.initial_scale,
    "silent_units": _signal.silent_units,
    "saturated_units": _signal.saturated_units,
    "initial_loss": _loss_lab.initial_loss,
    "loss_pairing": _loss_lab.loss_pairing,
    "reachable_loss": _loss_lab.reachable_loss,
    "loss_gradient": _loss_lab.loss_gradient,
    "loss_coupling": _loss_lab.loss_coupling,
    "train_and_eval": _batch.train_and_eval,
    "leaks": _batch.leaks,
    "sees_future": _places.sees_future,
    "overfit": _batch.overfit,
}
"""Name -> check, in the order in which they run."""


def preflight(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    skip: Sequence[str] = (),
    overfit_steps: int = 30,
) -> PreflightReport:
    """Check a model, a batch, a loss and an optimizer before training, and return what is wrong with them.

    Takes seconds for models that train in seconds: some ten passes over the batch, and `overfit_steps` to four times
    as many. Model, gradients, buffers, modes, hooks, optimizer and random states are afterwards what they were, bit
    for bit (in-place changes to lists and dicts that a forward makes on a module excepted); nothing is written.

    Args:
        model: on the device it will train on, in any mode.
        batch: as the loader yields it. `(x, y)` calls `model(x)`; a dict calls `model(**batch)` without its targets
            ("labels", "label", "targets", "target" or "y"); anything else is the model's argument, and, being a
            tensor, the target too. An `x` that is a tuple or dict is unpacked.
        loss_fn: `loss_fn(outputs, targets)`; or `loss_fn(model, batch)`, told by the name of its first argument
            (`model`, `module`, `net`, `network`); or None for a model that returns its loss (`outputs.loss`,
            `outputs["loss"]` or the loss itself). The first form allows the most checks.
        optimizer: one or several; without it, nothing is said of step sizes or of parameters left out.
        skip: names of checks (see `CHECKS`) to leave out.
        overfit_steps: optimizer steps on the one batch; 0 leaves training out.

    Raises:
        ConfigError: the batch holds no tensor, the loss is not one number, or the model has lazy parameters.
        UnknownNameError: `skip` names no check.
    """
    for name in skip:
        if name not in CHECKS:
            raise UnknownNameError("check", name, CHECKS, where="preflight")
    if not overfit_steps >= 0:
        raise ConfigError(f"`overfit_steps` must be 0 or more. Got {overfit_steps}.")
    begun = perf_counter()
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    task = Task(model, batch, loss_fn)
    skipped = dict.fromkeys(skip, "left out")
    # A trial run may warn of what the findings say better, or of a scheduler that did not step.
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = _first_passes(task, optimizers, overfit_steps)
        findings = _checked(trial, skipped)
    return PreflightReport(
        findings=tuple(findings),
        checks=tuple(name for name in CHECKS if name not in skipped),
        skipped=skipped,
        measures={"loss": trial.trace.loss, **trial.measures},
        seconds=perf_counter() - begun,
        can_learn=trial.trace.can_learn,
    )


def _checked(trial: Trial, skipped: dict[str, str]) -> list[PreflightFinding]:
    """Return what all checks find but those that are left out already; note why others could not be made."""
    findings: list[PreflightFinding] = []
    for name, check in CHECKS.items():
        if name not in skipped:
            try:
                with same_randomness():
                    findings += check(trial)
            except NotChecked as why:
                skipped[name] = str(why)
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {error}"
    return findings


def _first_passes(task: Task, optimizers: Sequence[Optimizer], overfit_steps: int) -> Trial:
    model = task.model
    model.train()
    with same_randomness():
        first = trace(task)
    lively = _lively(task, first)
    model.eval()
    with same_randomness(), torch.no_grad():
        eval_loss = task.run()[1].item()
    model.train()
    return Trial(task, first, lively, eval_loss, optimizers, overfit_steps)


def _lively(task: Task, first: Trace) -> Trace:
    """Trace again with small random values in weights that are all zero; they are zero again afterwards."""
    zeros = [p for p in task.model.parameters() if p.requires_grad and weight_shaped(p) and not bool(p.any())]
    if not zeros:
        return first
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            std = (2 / (p.shape[0] + p[0].numel())) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator).to(p) * std)
    with same_randomness():
        second = trace(task)
    with torch.no_grad():
        for p in zeros:
            p.zero_()
    return second
