"""The same checks for a LightningModule, which brings its own loss and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ._preflight import preflight
from ._report import PreflightReport

__all__ = ["check_lightning"]


def check_lightning(module: Any, batch: Any, **options: Any) -> PreflightReport:
    """Check a LightningModule before training: its `training_step` on a batch, and what `configure_optimizers` gives.

    Works without a Trainer and with either of Lightning's packages. `self.log`, `self.log_dict`, `self.manual_backward`
    and `self.optimizers` are put out of action for the time, so that nothing is logged or moved.

    Args:
        module: a LightningModule; `configure_model` must have run.
        batch: as its loader yields it, on the module's device.
        options: see `preflight`.

    Raises:
        ConfigError: the module trains by hand and returns no loss.
    """
    if getattr(module, "automatic_optimization", True) is False:
        raise ConfigError(
            f"{type(module).__name__} optimizes by hand, so its training_step can't be tried without moving it: "
            "call `gradwatch.preflight` on its network with a loss instead."
        )

    def training_step(model: nn.Module, given: Any) -> Any:
        loss = model.training_step(given, 0)  # type: ignore[operator]
        if loss is None:
            raise ConfigError(f"{type(model).__name__}.training_step returned None: give a batch that it trains on.")
        return loss

    quiet = dict.fromkeys(("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer"), _nothing)
    before = {name: module.__dict__.get(name, _ABSENT) for name in quiet}
    # A function in the instance's dict hides the method of the class; Lightning's `log` raises without a Trainer.
    module.__dict__.update(quiet)
    try:
        return preflight(module, batch, training_step, optimizers_of(module), **options)
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


_ABSENT = object()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def optimizers_of(module: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form `configure_optimizers` gives them; none where it needs a Trainer."""
    configure: Callable[[], Any] | None = getattr(module, "configure_optimizers", None)
    try:
        configured = configure() if configure else None
    except (AttributeError, RuntimeError):
        return []
    return _flatten(configured)


def _flatten(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _flatten(configured.get("optimizer"))
    if isinstance(configured, Sequence):
        return [optimizer for entry in configured for optimizer in _flatten(entry)]
    return []
