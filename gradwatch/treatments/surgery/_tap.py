"""Sees what a LightningModule's training_step returns, before Lightning takes the graph out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ._controller import SurgeryController
from ._split import collecting

__all__ = ["TrainingStepTap"]

_ABSENT = object()


class _Step:
    """Stands in for `module.training_step`. On a copy of the module it becomes the copy's own method."""

    def __init__(self, module: Any, original: Callable[..., Any], controller: SurgeryController) -> None:
        self.module = module
        self.controller = controller
        self.__wrapped__ = original
        self.__name__ = "training_step"
        self.__doc__ = original.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with collecting(self.controller):
            output = self.__wrapped__(*args, **kwargs)
        return self._with_tasks(output)

    def _with_tasks(self, output: Any) -> Any:
        losses = output.get("losses") if isinstance(output, dict) else None
        if not isinstance(losses, Mapping) or not losses or not isinstance(output.get("loss"), Tensor):
            return output
        total = self.controller.begin(losses)
        if not self.controller.replaces_loss:
            return output
        if not total.detach().allclose(output["loss"].detach(), rtol=1e-4):
            raise ConfigError(
                'combine=\'direct\' needs "loss" to be the sum of "losses". '
                f"Got {float(output['loss'].detach()):.6g} where the sum is {float(total.detach()):.6g}: return "
                "gradwatch.split(...) + the other terms instead."
            )
        return {**output, "loss": total, "losses": {name: loss.detach() for name, loss in losses.items()}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.module))
        return self.__wrapped__ if copy is None else type(copy).training_step.__get__(copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "training_step")


class TrainingStepTap:
    """Replaces `training_step` on one instance while a fit lasts; `close` restores exactly what was there.

    Inside it `split` reaches the controller, and the `"losses"` of a returned dict do too.

    Args:
        module: the LightningModule.
        controller: whose `begin` gets the losses.
    """

    def __init__(self, module: Any, controller: SurgeryController) -> None:
        self._module = module
        self._before = vars(module).get("training_step", _ABSENT)
        self._step = _Step(module, module.training_step, controller)
        vars(module)["training_step"] = self._step

    def close(self) -> None:
        """Put back what was there, unless someone else has replaced it since. May be called twice."""
        if vars(self._module).get("training_step") is not self._step:
            return
        if self._before is _ABSENT:
            del vars(self._module)["training_step"]
        else:
            vars(self._module)["training_step"] = self._before
