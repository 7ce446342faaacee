"""Runs over a part of the layers: begun with a residual stream, or ended with one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError
from ..torchside import tensors_of
from ._points import HookPoint, Point

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["LayerRun"]


class LayerRun:
    """One run between two layers.

    Attributes:
        args: for the model: where the run begins later, without the residual stream.
        kwargs: likewise.
        hooks: what puts the residual stream in.
        stop_at: where the run ends, or None.
        has_begun: the layer that the run begins at has been reached; always where it begins at the first.
    """

    def __init__(
        self, manager: HookManager, args: Sequence[Any], kwargs: dict[str, Any], start: int | None, stop: int | None
    ) -> None:
        self.args, self.kwargs, self.hooks, self.stop_at = tuple(args), dict(kwargs), list[Any](), None
        self.has_begun = start is None
        self.ends = stop is not None
        self._skipped: list[str] = []
        layers = manager.layers if start is not None or stop is not None else []
        if stop is not None:
            number = _number(stop, len(layers), "stop_at_layer")
            self.stop_at = f"{layers[number]}:input" if number < len(layers) else f"{layers[-1]}:output"
        if start is not None:
            number = _number(start, len(layers) - 1, "start_at_layer")
            self._skipped = layers[:number]
            self._begin_at(manager, layers[number])

    def _begin_at(self, manager: HookManager, path: str) -> None:
        if not (self.args and isinstance(self.args[0], Tensor) and self.args[0].is_floating_point()):
            raise ConfigError("a run that starts at a layer takes the residual stream there as its first argument.")
        residual, rest = self.args[0], self.args[1:]
        if "inputs_embeds" in inspect.signature(manager.model.forward).parameters:
            self.args, self.kwargs = rest, {**self.kwargs, "inputs_embeds": residual}
        point: HookPoint = manager._resolver.point(path, "input")
        point.leaf = "first"

        def begin(tensor: Tensor, point: Point) -> Tensor:
            self.has_begun = True
            return residual

        self.hooks.append((point, begin))

    def refuse_skipped(self, manager: HookManager, hooks: Sequence[Any]) -> None:
        """Raise where a hook sits in a layer that the run has nothing to do with."""
        for points, _ in hooks if self._skipped else ():
            for point in manager._resolver.resolve(points):
                if any(point.path == path or point.path.startswith(path + ".") for path in self._skipped):
                    raise ConfigError(f"the run starts after {point.name!r}: no hook there can act.")

    def output(self, output: Any) -> Any:
        """Return what a run gave; of an early end the residual stream."""
        if not self.ends or isinstance(output, Tensor):
            return output
        return next(tensor for _, tensor in tensors_of(output))


def _number(layer: int, most: int, name: str) -> int:
    number = layer + most if layer < 0 else layer
    if not 0 <= number <= most:
        raise ConfigError(f"`{name}` is a number of layers from 0 to {most}. Got {layer}.")
    return number
