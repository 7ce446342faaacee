"""Task losses as surgery needs them: scalars with a gradient, each counted once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["check_losses", "check_separate"]


def check_losses(losses: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a loss that is no scalar tensor, carries no gradient, or is there under two names."""
    names: dict[int, str] = {}
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"the loss of task {name!r} must be a scalar tensor that is still attached to the graph. "
                f"Got {type(loss).__name__}: don't call .item() on it."
            )
        if loss.numel() != 1:
            raise ConfigError(
                f"the loss of task {name!r} must be a scalar. Got shape {tuple(loss.shape)}: take its mean or sum."
            )
        if not loss.requires_grad:
            raise ConfigError(
                f"the loss of task {name!r} has no gradient: it was detached, or computed under no_grad or from frozen "
                "parameters alone. Leave the task out at steps at which it is absent."
            )
        first = names.setdefault(id(loss), name)
        if first != name:
            raise ConfigError(f"tasks {first!r} and {name!r} are the same tensor, which would count twice.")


def check_separate(losses: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where one task's loss is computed from another's, whose weight would then count twice."""
    for name, loss in losses.items():
        others = {other: value for other, value in losses.items() if other != name}
        if not others:
            continue
        found = torch.autograd.grad(
            loss, list(others.values()), torch.ones_like(loss), retain_graph=True, allow_unused=True
        )
        for other, grad in zip(others, found, strict=True):
            if grad is not None:
                raise ConfigError(
                    f"the loss of task {name!r} is computed from that of {other!r}, which would count twice. "
                    "Give the separate terms, and leave the total out."
                )
