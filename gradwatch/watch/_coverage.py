"""The account of a run: what every parameter and module counts as, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ._model_meter import ModelMeter

__all__ = ["IN_NO_OPTIMIZER", "MEASURED", "NO_GRADIENT", "REPLACED", "UNSEEN", "Standing", "coverage"]

MEASURED, NO_GRADIENT, IN_NO_OPTIMIZER = "measured", "no gradient", "in no optimizer"
REPLACED, UNSEEN = "replaced", "unseen"

FROZEN = "frozen: `requires_grad` is False"
NOT_REACHED = "no backward reached it: it is outside the graph of the loss, or its gradient was reset"
NOT_CALLED = "its module was not called"
NO_STEP = "no step was measured yet"

_PROPER = {"list": "nn.ModuleList", "tuple": "nn.ModuleList", "dict": "nn.ModuleDict"}


class Standing(NamedTuple):
    """What a path counts as (`"measured"`, `"no gradient"`, `"in no optimizer"`, `"replaced"`, `"unseen"`), and why."""

    state: str
    reason: str = ""


def coverage(meter: ModelMeter) -> dict[str, Standing]:
    """Return the standing of every parameter and module of a model at the last step, by path; not of what only holds
    others, as a ModuleList does: nothing can be seen of it.

    Parameters that an optimizer still holds and the model no more stand under `<optimizer>.` and their former path.
    """
    watched, account = meter.watched, meter.account
    # Asked once: each answer goes over all paths.
    measured, reasons = account.measured, account.reasons
    modules = _modules(meter)
    found: dict[str, Standing] = {}
    for _, path, p in watched.params:
        if path in measured:
            found[path] = Standing(MEASURED)
        elif path in reasons:
            found[path] = Standing(UNSEEN, reasons[path])
        else:
            found[path] = _without_gradient(path, p, modules, reasons.get(""), has_begun=account.num_steps > 0)
    for _, path, p in watched.unheld:
        why = reasons.get(path)
        if why is not None:
            found[path] = Standing(UNSEEN, why)
        elif p.requires_grad:
            found[path] = Standing(IN_NO_OPTIMIZER, "it takes a gradient, and no optimizer that is known holds it")
        else:
            found[path] = Standing(NO_GRADIENT, FROZEN)
    found |= {path: Standing(UNSEEN, why) for path, why in watched.strange.items()}
    for path, step in meter.model_now.replaced.items():
        reason = (
            f"since step {step} another parameter stands at {path!r}, or none; an optimizer holds the old one still"
        )
        found[f"<optimizer>.{path}"] = Standing(REPLACED, reason)
    return found | modules | dict(_unregistered(meter.model))


def _without_gradient(
    path: str, p: nn.Parameter, modules: dict[str, Standing], why_none: str | None, *, has_begun: bool
) -> Standing:
    """Return the standing of a parameter that had no gradient; `why_none`: why none had, None where some had."""
    if not p.requires_grad:
        return Standing(NO_GRADIENT, FROZEN)
    if why_none is not None:
        return Standing(NO_GRADIENT, why_none)
    if not has_begun:
        return Standing(UNSEEN, NO_STEP)
    owner = modules.get(path.rpartition(".")[0])
    is_idle = owner is not None and owner.reason.startswith("not called")
    return Standing(NO_GRADIENT, NOT_CALLED if is_idle else NOT_REACHED)


def _modules(meter: ModelMeter) -> dict[str, Standing]:
    if meter.tap is None:
        why = "modules are not sampled: `activations_every` is None"
        return {path: Standing(UNSEEN, why) for path in meter.watched.modules}
    reasons, holders = meter.tap.coverage(), meter.tap.holders
    return {
        path: Standing(UNSEEN, reasons[real]) if reasons.get(real) else Standing(MEASURED)
        for path, real in ((path, meter.real_path(path)) for path in meter.watched.modules if meter.has(path))
        if real not in holders
    }


def _unregistered(model: nn.Module) -> Iterator[tuple[str, Standing]]:
    """Yield modules in plain lists and mappings, which `model.parameters()` does not reach."""
    known = set(map(id, model.modules()))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # Exactly these: what others do when they are asked is not known.
            if name.startswith("_") or type(value) not in (list, tuple, dict):
                continue
            pairs = value.items() if type(value) is dict else enumerate(value)
            for key, item in pairs:
                if isinstance(item, nn.Module) and id(item) not in known and _takes_gradients(item):
                    where = f"{path}.{name}.{key}" if path else f"{name}.{key}"
                    kind = type(value).__name__
                    yield where, Standing(UNSEEN, f"it stands in a plain {kind}, not registered: use `{_PROPER[kind]}`")


def _takes_gradients(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
