"""From a measured Gramian to what is done about it: gating, guard, method, length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._diagnosis import conflicts, describe_treatment
from ._projection import GradVac
from ._settings import Surgery
from ._weights import weights

__all__ = ["Decider", "Decision", "keep_sum_length"]

# Below this share of the parts' lengths the combined gradient is what is left of a cancellation, and is not stretched.
_CANCELLED = 1e-3


@dataclass(frozen=True)
class Decision:
    """Weights of the tasks, (k,) float64, exactly 1 where nothing is done, and the scalars to report."""

    weights: Tensor
    scalars: dict[str, float]


class Decider:
    """Holds the method, and what it remembers, for one run."""

    def __init__(self, surgery: Surgery) -> None:
        self.surgery = surgery
        stateful = surgery.method == "gradvac"
        self._method: str | Callable[..., Any] = GradVac(**surgery.options) if stateful else surgery.method
        self._options = {} if stateful else surgery.options

    def decide(self, gramian: Tensor, names: tuple[str, ...], *, step: int) -> Decision:
        """Return the weights for a (k, k) float64 CPU Gramian; plain ones where it is not finite or not gated in."""
        ones = torch.ones(len(gramian), dtype=torch.float64)
        if not bool(torch.isfinite(gramian).all()):
            return Decision(ones, describe_treatment(gramian, names, ones, applied=False, fallback=True))
        gated = self.surgery.when != "conflict" or conflicts(gramian)
        if not gated or not float(gramian.diagonal().sum()) > 0:
            return Decision(ones, describe_treatment(gramian, names, ones, applied=False, fallback=False))
        result = self._weights(gramian, step)
        if not bool(torch.isfinite(result).all()):
            return Decision(ones, describe_treatment(gramian, names, ones, applied=False, fallback=True))
        if self.surgery.keep_length:
            result = keep_sum_length(gramian, result)
        return Decision(
            result, describe_treatment(gramian, names, result, applied=bool((result != 1).any()), fallback=False)
        )

    def state_dict(self) -> dict[str, Any]:
        state = getattr(self._method, "state_dict", None)
        return {} if state is None else {"method": dict(state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load = getattr(self._method, "load_state_dict", None)
        if load is not None and "method" in state:
            load(state["method"])

    def _weights(self, gramian: Tensor, step: int) -> Tensor:
        if isinstance(self._method, GradVac):
            return self._method(gramian, step=step)
        return weights(self._method, gramian, step=step, **self._options)


def keep_sum_length(gramian: Tensor, result: Tensor) -> Tensor:
    """Return the weights stretched so that the combined gradient is as long as the plain sum.

    Where the parts cancel to less than a thousandth of their lengths (near a Pareto-stationary point), the stretch
    fades out in proportion: the direction of such a rest means little. Equal weights become exactly 1.
    """
    ones = torch.ones_like(result)
    G = gramian / gramian.diagonal().sum()
    plain = max(float(ones @ G @ ones), 0.0) ** 0.5
    length = max(float(result @ G @ result), 0.0) ** 0.5
    parts = float(result.abs() @ G.diagonal().sqrt())
    if not parts > 0 or not length > 0:
        return result
    if bool((result == result[0]).all()) and float(result[0]) > 0:
        return ones
    return result * (plain / length) * min(1.0, length / parts / _CANCELLED)
