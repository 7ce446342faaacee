"""Changes of what the optimizer does: rates, decay, clipping, moments, which parameters it holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import nn
from torch.optim import LBFGS

from ..errors import ConfigError
from ._change import Change, NotApplicable
from ._trial import Trial

__all__ = [
    "AllParameters",
    "Beta2",
    "Clip",
    "Epsilon",
    "FreshMoments",
    "InitialRate",
    "LearningRate",
    "Unclipped",
    "Unfrozen",
    "WarmUp",
    "WeightDecay",
]

UNUSUAL_DECAY = {True: 0.3, False: 0.05}
"""Weight decay above which nobody trains: decoupled (AdamW), and as a part of the gradient."""
UNUSUAL_EPSILON = 1e-4
UNUSUAL_BETA2 = (0.89, 0.99995)
FADED = 1e-2
"""Share of its first value below which a learning rate is that of a schedule that is over."""
STANDS_OUT = 3.0
"""Times the median from which on a norm or a loss stands out."""


def _entry(trial: Trial, name: str) -> list[dict[str, Any]]:
    found = [group for group in trial.groups if name in group]
    if not found:
        kinds = " and ".join(sorted({type(o).__name__ for o in trial.optimizers}))
        raise NotApplicable(f"{kinds} has no {name}")
    return found


@dataclass(frozen=True, repr=False)
class LearningRate(Change):
    """The learning rates times a factor."""

    factor: float = 0.1

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.factor != 1 and isfinite(self.factor)):
            raise ConfigError(f"LearningRate: `factor` must be above 0, and not 1. Got {self.factor}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"learning rate x {self.factor:g}" if self.factor > 1 else f"learning rate / {1 / self.factor:g}"

    @property
    def cause(self) -> str:  # type: ignore[override]
        return f"the learning rate is too {'low' if self.factor > 1 else 'high'}"

    @property
    def advice(self) -> str:  # type: ignore[override]
        return f"{'Raise' if self.factor > 1 else 'Lower'} the learning rate."

    def apply(self, trial: Trial) -> None:
        for group in _entry(trial, "lr"):
            group["lr"] = group["lr"] * self.factor


@dataclass(frozen=True, repr=False)
class InitialRate(Change):
    """The learning rates that the schedule began with."""

    name: str = "learning rate as at first"
    kind: str = "repair"
    cause: str = "the schedule has taken the learning rate down too early"
    advice: str = "Step the scheduler as often as it was made for: once per epoch, or once per step."

    def apply(self, trial: Trial) -> None:
        faded = [g for g in trial.groups if float(g.get("initial_lr", 0)) * FADED > float(g.get("lr", 0))]
        if not faded:
            raise NotApplicable("the learning rate is of the size that it began with, or no scheduler noted that")
        for group in faded:
            group["lr"] = group["initial_lr"]


@dataclass(frozen=True, repr=False)
class WarmUp(Change):
    """Learning rates that rise from a twentieth over the steps."""

    name: str = "warm-up"
    cause: str = "the first steps are too large for a network that has learnt nothing yet"
    advice: str = "Warm the learning rate up over the first steps."
    steps: int = 20

    def apply(self, trial: Trial) -> None:
        rates = [(group, group["lr"]) for group in _entry(trial, "lr")]

        def warm(step: int) -> None:
            for group, rate in rates:
                group["lr"] = rate * min(1.0, (step + 1) / self.steps)

        trial.before_step.append(warm)


def _decay_is_unusual(trial: Trial) -> bool:
    found = []
    for optimizer in trial.optimizers:
        decoupled = "AdamW" in type(optimizer).__name__
        for group in optimizer.param_groups:
            decoupled = bool(group.get("decoupled_weight_decay", decoupled))
            found.append(float(group.get("weight_decay", 0.0)) > UNUSUAL_DECAY[decoupled])
    return any(found)


@dataclass(frozen=True, repr=False)
class WeightDecay(Change):
    """Another weight decay."""

    value: float = 0.0
    cause: str = "weight decay pulls harder than the gradients"
    advice: str = "Lower the weight decay."

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"weight decay {self.value:g}"

    def apply(self, trial: Trial) -> None:
        found = [group for group in _entry(trial, "weight_decay") if group["weight_decay"] != self.value]
        if not found:
            raise NotApplicable(f"it is {self.value:g}")
        for group in found:
            group["weight_decay"] = self.value

    def kind_in(self, trial: Trial) -> str:
        return "repair" if _decay_is_unusual(trial) else "setting"


@dataclass(frozen=True, repr=False)
class Clip(Change):
    """Gradients clipped to a global norm; None: the usual one, the median of the norms without the change."""

    max_norm: float | None = None
    cause: str = "single gradients are far larger than the usual ones"
    advice: str = "Clip the global norm."

    @property
    def name(self) -> str:  # type: ignore[override]
        return "clip at the usual norm" if self.max_norm is None else f"clip at {self.max_norm:g}"

    def apply(self, trial: Trial) -> None:
        usual = trial.course.usual_norm
        largest = max(trial.course.norms, default=0.0)
        if self.max_norm is None and isfinite(largest) and not largest > STANDS_OUT * usual:
            raise NotApplicable("no norm stands out")
        norm = usual if self.max_norm is None else self.max_norm
        if not norm > 0:
            raise NotApplicable("no norm is known")
        trial.clip = norm if trial.clip is None else min(norm, trial.clip)


@dataclass(frozen=True, repr=False)
class Unclipped(Change):
    """Gradients as they are."""

    name: str = "unclipped"
    cause: str = "gradients are clipped far below their usual norm"
    advice: str = "Raise the norm that gradients are clipped to."

    def apply(self, trial: Trial) -> None:
        if trial.clip is None:
            raise NotApplicable("nothing is clipped that `clip` would tell of")
        trial.clip = None

    def kind_in(self, trial: Trial) -> str:
        usual = trial.course.usual_norm
        return "repair" if trial.clip is not None and trial.clip < 0.01 * usual else "setting"


@dataclass(frozen=True, repr=False)
class Epsilon(Change):
    """Adam's epsilon."""

    value: float = 1e-8
    cause: str = "the optimizer's epsilon is larger than the gradients, and holds the steps back"
    advice: str = "Set `eps` to its default, 1e-8."

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"epsilon {self.value:g}"

    def apply(self, trial: Trial) -> None:
        found = [group for group in _entry(trial, "eps") if group["eps"] is not None and group["eps"] != self.value]
        if not found:
            raise NotApplicable(f"it is {self.value:g}")
        for group in found:
            group["eps"] = self.value

    def kind_in(self, trial: Trial) -> str:
        values = [group.get("eps") for group in trial.groups]
        unusual = any(isinstance(v, float) and not 0 < v <= UNUSUAL_EPSILON for v in values)
        return "repair" if unusual else "setting"


@dataclass(frozen=True, repr=False)
class Beta2(Change):
    """Adam's second beta: over how many steps squares of gradients are averaged."""

    value: float = 0.999

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"beta2 {self.value:g}"

    @property
    def cause(self) -> str:  # type: ignore[override]
        return "the second moment follows the gradients " + ("too slowly" if self.value < 0.99 else "too fast")

    @property
    def advice(self) -> str:  # type: ignore[override]
        return f"Set the second beta to {self.value:g}."

    def apply(self, trial: Trial) -> None:
        found = [group for group in _entry(trial, "betas") if float(group["betas"][1]) != self.value]
        if not found:
            raise NotApplicable(f"it is {self.value:g}")
        for group in found:
            group["betas"] = (group["betas"][0], self.value)

    def kind_in(self, trial: Trial) -> str:
        low, high = UNUSUAL_BETA2
        betas = [float(group["betas"][1]) for group in trial.groups if "betas" in group]
        return "repair" if any(not low <= beta <= high for beta in betas) else "setting"


@dataclass(frozen=True, repr=False)
class FreshMoments(Change):
    """An optimizer that remembers nothing."""

    name: str = "fresh optimizer state"
    cause: str = "what the optimizer remembers of earlier gradients misleads it"
    advice: str = "Make the optimizer anew where the data or the loss changes, or load its state with the weights."

    def apply(self, trial: Trial) -> None:
        if not any(optimizer.state for optimizer in trial.optimizers):
            raise NotApplicable("the optimizer remembers nothing")
        for optimizer in trial.optimizers:
            optimizer.state.clear()


@dataclass(frozen=True, repr=False)
class AllParameters(Change):
    """Every parameter that requires a gradient is the optimizer's."""

    name: str = "all parameters in the optimizer"
    kind: str = "repair"
    cause: str = "parameters that require a gradient are in no optimizer"
    advice: str = "Make the optimizer after the last module, from all `model.parameters()`."

    def apply(self, trial: Trial) -> None:
        _hold(trial, "the optimizer holds all parameters that require a gradient")


@dataclass(frozen=True, repr=False)
class Unfrozen(Change):
    """Every parameter is trained."""

    name: str = "all parameters unfrozen"
    kind: str = "part"
    cause: str = "what is frozen would have to learn"
    advice: str = "Set `requires_grad` of those parameters, and give them to the optimizer."

    def apply(self, trial: Trial) -> None:
        frozen = [p for p in trial.parameters().values() if not p.requires_grad and p.is_floating_point()]
        if not frozen:
            raise NotApplicable("no parameter is frozen")
        for p in frozen:
            p.requires_grad_(True)
        _hold(trial, "")


def _hold(trial: Trial, otherwise: str) -> None:
    optimizer = trial.optimizers[0]
    if isinstance(optimizer, LBFGS):
        raise NotApplicable("LBFGS takes one group of parameters")
    held = {id(p) for group in trial.groups for p in group["params"]}
    missing: list[nn.Parameter] = [p for p in trial.parameters().values() if p.requires_grad and id(p) not in held]
    if missing:
        optimizer.add_param_group({"params": missing})
    elif otherwise:
        raise NotApplicable(otherwise)
