"""What optimizers and modules are set to, in numbers that stand beside what was measured. Reads nothing back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from ..stats import At, Number
from ..torchside import home, is_host, moved, wide_dtype
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._numbers import Scalars
from ._options import MeasureOptions

__all__ = ["Measured", "Settings", "configured"]

Measured = dict[str, Number]

_DECOUPLED = ("adamw", "lion", "nadamw", "sgdw", "muon")
_MAX_ELEMENTS = 2**22
"""Of second moments: what is asked is a size, which that many tell."""


class Settings(Measurement):
    """What optimizers and modules are set to, where updates are measured, which it stands beside: see `configured`."""

    part = "settings"
    of_gradients = False
    gives = (
        "weight_decay",
        "decay_is_decoupled",
        "epsilon",
        "beta2",
        "second_moments",
        "num_second_moments",
        "dropout_in_eval",
        "dropout_rate",
        "batch_norm_means",
        "batch_norm_in_eval",
        "batch_norm_followed",
        "batch_norm_batches",
        "batch_norm_momentum",
        "written_between",
    )

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.every = meter.options.updates_every or 1

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.updates_every is not None

    def look(self, view: StepView, tables: dict[str, Tensor]) -> Mapping[str, Number]:
        watched = self.meter.watched
        in_pieces = view.ranks.num > 1 and (watched.is_in_pieces or watched.zero is not None)
        with torch.no_grad():
            found = configured(self.meter.model, view.optimizers, in_pieces=in_pieces)
        return found | {"written_between": self.meter.account.written_between}

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        return {name: float(np.sum(value)) for name, value in found.items()}


def configured(model: nn.Module, optimizers: Sequence[Optimizer], *, in_pieces: bool = False) -> Measured:
    """Return what optimizers and modules are set to, as far as it can be told; what can't is absent.

    Args:
        model: the model.
        optimizers: those that step.
        in_pieces: what optimizers remember of parameters is a part on each rank, and another one on the next.

    Returns:
        name -> float, or 0-dim tensor that nobody has read, or several that are to be added up; see the page "What a
        record holds".
    """
    groups = [(o, g) for o in optimizers for g in o.param_groups if _number(g.get("lr")) > 0]
    epsilon = {} if in_pieces else _epsilon(groups)
    modules = list(model.modules())
    return {**_decay(groups), **epsilon, **_modes(modules), **_statistics(modules)}


def _number(value: Any) -> float:
    """Return a setting as a number; nan where it is none, or lies on a device."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and is_host(value.device) else math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _decay(groups: Sequence[tuple[Optimizer, Mapping[str, Any]]]) -> Scalars:
    """The largest weight decay, and whether it acts beside the gradient (AdamW) or is added to it (L2)."""
    decays = [(decay, o, g) for o, g in groups if (decay := _number(g.get("weight_decay"))) > 0]
    if not decays:
        return {}
    decay, optimizer, group = max(decays, key=lambda d: d[0])
    name = type(optimizer).__name__.lower()
    # torch's own key, and that of other libraries.
    beside = group.get("decoupled_weight_decay", group.get("decouple", name.startswith(_DECOUPLED)))
    return {"weight_decay": decay, "decay_is_decoupled": float(bool(beside))}


def _epsilon(groups: Sequence[tuple[Optimizer, Mapping[str, Any]]]) -> Measured:
    """Adam's epsilon, and how large second moments are that stand beside it: one kernel, but on the host."""
    found = [(_number(g.get("eps")), _number(g["betas"][1]), _moments(o, g)) for o, g in groups if _has_betas(g)]
    found = [f for f in found if f[0] > 0 and f[2]]
    found = [f for f in found if f[2][0].device == found[0][2][0].device]
    if not found:
        return {}
    moments = [v for _, _, held in found for v in held]
    # Means of squares: their sum is their 1-norm, which the host finds in a third of the time.
    on_host = is_host(moments[0].device)
    return {
        "epsilon": max(epsilon for epsilon, _, _ in found),
        "beta2": max(beta for _, beta, _ in found),
        # To be added up on the host.
        "second_moments": [v.sum() for v in moments] if on_host else torch._foreach_norm(moments, 1),
        "num_second_moments": float(sum(v.numel() for v in moments)),
    }


def _has_betas(group: Mapping[str, Any]) -> bool:
    betas = group.get("betas")
    return isinstance(betas, (tuple, list)) and len(betas) >= 2


def _moments(optimizer: Optimizer, group: Mapping[str, Any]) -> list[Tensor]:
    """Return some second moments of a group, all on one device."""
    held = [optimizer.state.get(p, {}).get("exp_avg_sq") for p in group["params"] if p.grad is not None]
    held = [v for v in held if type(v) is Tensor and v.numel()]
    moments: list[Tensor] = []
    left = _MAX_ELEMENTS
    for v in held:
        if v.device == held[0].device and (not moments or v.numel() <= left):
            moments.append(v)
            left -= v.numel()
    return moments


def _modes(modules: Sequence[nn.Module]) -> Scalars:
    """Dropout: how many layers are in eval mode while the model is trained, and the largest rate of the others."""
    drops = [m for m in modules if isinstance(m, _DropoutNd) and m.p > 0]
    if not drops:
        return {}
    rates = [float(m.p) for m in drops if m.training]
    in_eval = 1 - len(rates) / len(drops)
    return {"dropout_in_eval": in_eval, **({"dropout_rate": max(rates)} if rates else {})}


def _statistics(modules: Sequence[nn.Module]) -> Scalars:
    """What BatchNorm's running statistics are made of: of how many layers they are not used, how far they follow."""
    norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats and _is_trained(m)]
    counts = [m.num_batches_tracked for m in norms if isinstance(m.num_batches_tracked, Tensor)]
    if not counts or len(counts) != len(norms):
        return {}
    device = home(counts)
    seen = torch.stack([moved(c, device).to(wide_dtype(device)) for c in counts])
    momenta = [0.0 if m.momentum is None else float(m.momentum) for m in norms]
    # With no momentum they are the mean of all batches, and follow from the first.
    kept = torch.stack([torch.full_like(seen[0], 1.0 - m if m else 0.0) for m in momenta])
    means = [m.running_mean for m in norms if isinstance(m.running_mean, Tensor) and m.running_mean.device == device]
    return {
        **({"batch_norm_means": torch.stack(torch._foreach_norm(means)).sum()} if means else {}),
        "batch_norm_in_eval": _share_in_eval(modules, norms),
        "batch_norm_followed": (1 - kept.pow(seen)).amin(),
        "batch_norm_batches": seen.amin(),
        **({"batch_norm_momentum": min(m for m in momenta if m)} if any(momenta) else {}),
    }


def _share_in_eval(modules: Sequence[nn.Module], norms: Sequence[nn.Module]) -> float:
    """Return which share of layers is in eval mode together with the module that holds them: one that is set so by
    itself, within a module in training mode, is somebody's choice."""
    chosen = {id(child) for holder in modules if holder.training for child in holder.children()}
    return sum(not m.training and id(m) not in chosen for m in norms) / len(norms)


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False)) or not any(
        True for _ in module.parameters(recurse=False)
    )
