"""Checks of parameters: do they get a gradient, does an optimizer hold them, can they learn different things."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ._report import PreflightFinding
from ._trial import NotChecked, Trial, weight_shaped

__all__ = [
    "dead_weights",
    "frozen",
    "held_by_optimizer",
    "learning_rate",
    "symmetric_rows",
    "trainable",
    "without_gradient",
]

Findings = Iterable[PreflightFinding]


def trainable(trial: Trial) -> Findings:
    """Something can learn at all."""
    if trial.trace.can_learn:
        return
    frozen = not trial.parameters
    yield PreflightFinding(
        check="nothing_trainable",
        severity="critical",
        message="no parameter requires a gradient" if frozen else "the loss does not depend on any parameter",
        cause="requires_grad_(False) on the whole model"
        if frozen
        else "a detach(), no_grad() or .item() before the loss",
        advice="call model.requires_grad_(True) on what shall train" if frozen else "keep the graph up to the loss",
    )


def frozen(trial: Trial) -> Findings:
    """A remark on what does not require a gradient: which share of the model, and whether it was ever trained."""
    still = {path: p for path, p in trial.model.named_parameters() if not p.requires_grad}
    total = sum(p.numel() for p in trial.model.parameters())
    share = sum(p.numel() for p in still.values()) / max(total, 1)
    trial.measures["frozen_share"] = share
    if not still or not trial.parameters:
        return
    fresh = _as_made(trial, still)
    yield PreflightFinding(
        check="frozen",
        severity="info",
        path=next(iter(still)),
        message=f"{share:.1%} of the model's {total} elements require no gradient: {_some(list(still))}"
        + ("; they look as they were initialised, and will stay so" if fresh else ""),
        cause="requires_grad_(False) on more than was meant, or on weights before they were loaded" if fresh else "",
        advice="load the trained weights first; freeze by name and print what is left" if fresh else "",
        value=share,
        limit=0.0,
    )


def _as_made(trial: Trial, still: dict[str, nn.Parameter]) -> bool:
    """Return whether frozen linear layers and convolutions hold what torch draws for them, and norms ones and zeros."""
    owners = {_owner(path): trial.model.get_submodule(_owner(path)) for path in still}
    known = [fresh for m in owners.values() if (fresh := _is_fresh(m)) is not None]
    return len(known) > 0 and all(known)


def _is_fresh(module: nn.Module) -> bool | None:
    """Return whether a module is as it was made; None where that can't be told."""
    weight = module.__dict__.get("_parameters", {}).get("weight")
    if weight is None or weight.numel() < _ENOUGH:
        return None
    values = weight.detach().double().flatten()
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        bound = (weight[0].numel()) ** -0.5
        spread = values.std().item() * 3**0.5
        # Four standard errors of a uniform distribution's deviation.
        return (
            values.abs().max().item() <= bound * (1 + 1e-6) and abs(spread - bound) < 1.8 * bound / len(values) ** 0.5
        )
    return bool((values == 1).all()) if isinstance(module, _NORMS) else None


_ENOUGH = 16
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def without_gradient(trial: Trial) -> Findings:
    """Parameters that the loss does not depend on: a cut graph where they come before others, else unused ones."""
    if not trial.trace.can_learn:
        return
    grads, order = trial.trace.grads, [m.path for m in trial.trace.modules]
    reached = [order.index(owner) for p, g in grads.items() if g is not None and (owner := _owner(p)) in order]
    last_reached = max(reached, default=-1)
    missing = [path for path, grad in grads.items() if grad is None]
    sizes = {path: trial.parameters[path].numel() for path in grads}
    trial.measures["without_gradient_share"] = sum(sizes[p] for p in missing) / max(sum(sizes.values()), 1)
    cut = [p for p in missing if _owner(p) in order and order.index(_owner(p)) < last_reached]
    unused = [p for p in missing if p not in cut]
    if cut:
        yield PreflightFinding(
            check="no_gradient",
            severity="critical",
            path=cut[0],
            message=f"{len(cut)} trainable parameters run in forward but get no gradient, though later ones do",
            cause="detach(), no_grad(), .data or a numpy round trip between them and the loss",
            advice="remove the cut; freeze them with requires_grad_(False) if it is meant",
            value=len(cut),
            limit=0,
        )
    if unused:
        yield PreflightFinding(
            check="unused",
            severity="info",
            path=unused[0],
            message=f"{len(unused)} trainable parameters take no part in the loss: {_some(unused)}",
            cause="a head or branch that this batch does not use, or a layer that forward forgot",
            advice="use them, freeze them, or leave them out of the optimizer",
            value=len(unused),
            limit=0,
        )


def dead_weights(trial: Trial) -> Findings:
    """Weights whose gradient is exactly zero, though their module ran on rows and nothing behind them is at zero."""
    traces = {m.path: m for m in trial.lively.modules}
    dead = []
    for path, grad in trial.lively.grads.items():
        owner = traces.get(_owner(path))
        if grad is None or owner is None or owner.is_empty or not weight_shaped(trial.parameters[path]):
            continue
        if grad.layout == torch.strided and not bool(grad.any()):
            dead.append(path)
    if dead and trial.is_finite:
        yield PreflightFinding(
            check="dead",
            severity="critical",
            path=dead[-1],
            message=f"{len(dead)} of {len(trial.lively.grads)} parameters have a gradient of exactly 0: {_some(dead)}",
            cause="units behind them that pass nothing back: dead ReLUs, a softmax over one unit, a clamp, underflow",
            advice="look at the module after it; check the last activation; scale the initialisation; lower the depth",
            value=len(dead),
            limit=0,
        )


def symmetric_rows(trial: Trial) -> Findings:
    """Weights whose rows are all equal and not zero: the units compute the same and get the same gradient."""
    for path, p in trial.parameters.items():
        if not weight_shaped(p) or p.shape[0] < 2 or not p.is_floating_point() or _is_embedding(trial, path):
            continue
        flat = p.detach().flatten(1)
        largest = flat.abs().max().item()
        if largest > 0 and (flat.max(0).values - flat.min(0).values).max().item() <= 1e-7 * largest:
            yield PreflightFinding(
                check="symmetric_units",
                severity="critical",
                path=path,
                message=f"all {p.shape[0]} rows are equal, so its units stay copies of one another",
                cause="a constant initialisation",
                advice="initialise at random (the layer's default, Glorot or He)",
                value=0.0,
                limit=1e-7,
            )


def held_by_optimizer(trial: Trial) -> Findings:
    """Every parameter that gets a gradient is in one optimizer, once."""
    if not trial.optimizers:
        raise NotChecked("no optimizer was given")
    held = [id(p) for o in trial.optimizers for group in o.param_groups for p in group["params"]]
    every = {id(p) for p in trial.model.parameters()}
    learning = [p for p, grad in trial.trace.grads.items() if grad is not None]
    missing = [path for path in learning if id(trial.parameters[path]) not in set(held)]
    if missing:
        all_missing = len(missing) == len(learning)
        strangers = sum(i not in every for i in held)
        yield PreflightFinding(
            check="not_in_optimizer",
            severity="critical" if all_missing else "warning",
            path=missing[0],
            message=f"{len(missing)} of {len(learning)} parameters that get a gradient are in no optimizer"
            + (f", which holds {strangers} that are not the model's" if strangers else f": {_some(missing)}"),
            cause="the optimizer was made before the model was replaced, copied or extended; or from a part of it",
            advice="make the optimizer from model.parameters() last; freeze what shall not train",
            value=len(missing),
            limit=0,
        )
    twice = sorted({path for path, p in trial.model.named_parameters() if held.count(id(p)) > 1})
    if twice:
        yield PreflightFinding(
            check="twice_in_optimizer",
            path=twice[0],
            message=f"{len(twice)} parameters are held twice and will move twice a step: {_some(twice)}",
            cause="overlapping parameter groups, or two optimizers over the same parameters",
            advice="give every parameter to one group of one optimizer",
            value=len(twice),
            limit=0,
        )


def learning_rate(trial: Trial) -> Findings:
    """Some group moves, or will after warm-up."""
    if not trial.optimizers:
        raise NotChecked("no optimizer was given")
    groups = [group for o in trial.optimizers for group in o.param_groups if group["params"]]
    if not groups or any(float(group.get("lr", 1.0)) != 0 for group in groups):
        return
    will_rise = any(float(group.get("initial_lr", 0.0)) > 0 for group in groups)
    yield PreflightFinding(
        check="zero_learning_rate",
        severity="info" if will_rise else "warning",
        message="the learning rate is 0 in every group" + (" (a schedule will raise it)" if will_rise else ""),
        cause="a schedule's first step, or lr=0",
        advice="" if will_rise else "set lr above 0",
        value=0.0,
        limit=0.0,
    )


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def _is_embedding(trial: Trial, path: str) -> bool:
    return isinstance(trial.model.get_submodule(_owner(path)), (nn.Embedding, nn.EmbeddingBag))


def _some(paths: list[str], most: int = 3) -> str:
    return ", ".join(paths[:most]) + (", ..." if len(paths) > most else "")
