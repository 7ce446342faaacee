"""How gradients grow or vanish on their way back through a model."""

from __future__ import annotations

from math import isnan, log10
from typing import TYPE_CHECKING

from ._monitor import Monitor
from ._points import Point

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GradientFlow"]


class GradientFlow(Monitor):
    """The size of the gradient at each point, in the order in which backward came by.

    Example:
        >>> with hooks.gradient_flow("blocks.?:grad_output") as flow:
        ...     model(x).sum().backward()
        >>> print(flow.table())
        >>> flow.ratios()["blocks.2:grad_output"]  # of its rms to that of the point before it on the way back
    """

    def __init__(self) -> None:
        super().__init__()
        self._order: dict[str, None] = {}

    def observe(self, tensor: Tensor, point: Point) -> None:
        self._order.setdefault(f"{point.name}[{point.leaf}]" if point.leaf else point.name)
        super().observe(tensor, point)

    def reset(self) -> None:
        super().reset()
        self._order.clear()

    def sizes(self) -> dict[str, float]:
        """Return the root mean square of the gradient by point, from the loss back to the input."""
        return {name: self[name].rms for name in self._order if name in self}

    def ratios(self) -> dict[str, float]:
        """Return how much the gradient grew from each point to the next: below 1 it shrinks; nan after a zero."""
        names, sizes = list(self.sizes()), list(self.sizes().values())
        pairs = zip(names[1:], sizes[1:], sizes, strict=False)
        return {name: size / before if before else float("nan") for name, size, before in pairs}

    def table(self) -> str:
        """Return sizes and ratios as text, one point a line, with a bar on a scale of powers of ten."""
        sizes, ratios = self.sizes(), self.ratios()
        width = max(map(len, sizes), default=5)
        largest = max((s for s in sizes.values() if not isnan(s)), default=0.0)
        lines = [f"{'point':{width}} {'rms':>10} {'ratio':>8}"]
        for name, size in sizes.items():
            share = size / largest if largest else 0.0
            bar = "" if not share > 0 else "#" * max(1, 20 + round(2 * log10(share)))
            lines.append(f"{name:{width}} {size:10.3g} {ratios.get(name, float('nan')):8.3g} {bar}")
        return "\n".join(lines)
