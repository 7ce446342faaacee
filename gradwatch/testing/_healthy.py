"""Fail a test where a model can't train well, with the words that a user would read."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from .._preflight import PreflightReport, Task, preflight, unchanged
from ..errors import ConfigError
from ..records import Incident
from ..rules import RULES
from ..watch import Watch

__all__ = ["assert_healthy"]


def assert_healthy(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    steps: int = 5,
    ignore: Sequence[str] = (),
    overfit_steps: int = 0,
) -> PreflightReport:
    """Check a model before training and over a few watched steps on one batch; raise where something is wrong.

    Looks for what `gradwatch.preflight` looks for (dead layers, gradients that vanish or are cut, parameters missing
    from the optimizer, outputs that can't reach the targets, another loss in eval mode, ...), and in the steps for
    losses, gradients and outputs that are not finite, spikes, and parameters that never move. The model, its
    gradients and all random states are afterwards what they were, bit for bit; the optimizer is not stepped, a
    twin of it is.

    Args:
        model, batch, loss_fn, optimizer: see `gradwatch.preflight`. Without an optimizer the steps are SGD's, small
            ones, and nothing is said of parameters left out.
        steps: optimizer steps on the batch; 0 for the checks alone.
        ignore: names of checks' findings and rules (`unnormalised_input`, `dead_units`, ...) that shall not fail.
        overfit_steps: as in `preflight`; 0 leaves "can it overfit one batch" out.

    Returns:
        The report, for what is merely worth knowing.

    Raises:
        AssertionError: something of severity warning or above was found; its message names each with cause and
            advice.
        ConfigError: the batch or the loss can't be used, or `steps` is below 0.
    """
    if not steps >= 0:
        raise ConfigError(f"`steps` must be 0 or more. Got {steps}.")
    report = preflight(model, batch, loss_fn, optimizer, overfit_steps=overfit_steps)
    incidents = [] if not steps or not report.can_learn else _watched_steps(model, batch, loss_fn, optimizer, steps)
    said = [_words(str(f), f.cause, f.advice) for f in report.alarms if f.check not in ignore]
    said += [_words(str(i), "", i.advice) for i in incidents if i.rule not in ignore and i.severity != "info"]
    if said:
        raise AssertionError(f"{type(model).__name__} is not healthy:\n" + "\n".join(said))
    return report


def _words(what: str, cause: str, advice: str) -> str:
    reasons = [f"    {label}: {text}" for label, text in (("cause", cause), ("try", advice)) if text]
    return "\n".join([what, *reasons])


def _watched_steps(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None, optimizer: Any, steps: int
) -> list[Incident]:
    task = Task(model, batch, loss_fn)
    rules: list[Any] = [RULES["non_finite"](), RULES["exploding"](min_samples=4)]  # type: ignore[call-arg]
    with unchanged(model):
        model.train()
        optimizers = _twins(model, optimizer)
        before = {path: p.detach().clone() for path, p in model.named_parameters() if p.requires_grad}
        moved_by: set[str] = set()
        with Watch(model, optimizers, rules=rules, activations_every=1, on_error="raise") as watch:
            for _ in range(steps):
                outputs, loss = task.run()
                loss.backward()
                moved_by |= {path for path, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
                watch.step(loss=loss, batch=task.inputs, outputs=outputs, targets=task.targets)
                for o in optimizers:
                    o.zero_grad()
            incidents = list(watch.incidents)
        held = {id(p) for o in optimizers for group in o.param_groups if group.get("lr", 1) for p in group["params"]}
        still = [
            path
            for path, p in model.named_parameters()
            if path in moved_by and id(p) in held and torch.equal(before[path], p.detach())
        ]
    if still and not incidents:
        incidents.append(
            Incident(
                rule="not_updating",
                first_step=0,
                last_step=steps - 1,
                severity="critical",
                paths=tuple(still),
                first_path=still[0],
                value=0.0,
                limit=0.0,
                message=f"{len(still)} parameters have a gradient and did not move in {steps} steps",
                advice="raise the learning rate; check the dtype: small updates of bfloat16 weights round to nothing",
            )
        )
    return incidents


def _twins(model: nn.Module, optimizer: Any) -> list[Optimizer]:
    """Return optimizers of the same kinds and settings over the same parameters, with memories of their own."""
    if optimizer is None:
        return [SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)]
    twins = []
    for original in [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer):
        twin = copy.copy(original)
        twin.state = defaultdict(dict)
        twin.param_groups = [dict(group) for group in original.param_groups]
        twins.append(twin)
    return twins
