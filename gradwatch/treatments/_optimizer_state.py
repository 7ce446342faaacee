"""What treatments find in the states of optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..torchside import StandIn, real_of

__all__ = ["MOMENTS", "SECOND_MOMENTS", "second_moment", "states_of"]

SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
"""Keys of a running mean of squared gradients: of Adam and its kin, of RMSprop."""

MOMENTS = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "mu_product"),
)
"""Keys of memories of past gradients, in the optimizers that come with torch."""


def states_of(optimizers: Sequence[Any], parameter: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the state that each optimizer keeps of a parameter."""
    for optimizer in optimizers:
        states = getattr(optimizer, "optimizer", optimizer).state
        # Asking a defaultdict by key would write in it.
        held = real_of(parameter)
        if held in states:
            yield states[held] if held is parameter else _part_of(states[held], parameter)


def second_moment(optimizers: Sequence[Any], parameter: Tensor) -> Tensor | None:
    """Return the running mean of squared gradients that an optimizer keeps of a parameter, or None."""
    for state in states_of(optimizers, parameter):
        for key in SECOND_MOMENTS:
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                return value
    return None


def _part_of(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the part of a state that is about one parameter, sharing its memory."""
    if not isinstance(parameter, StandIn):
        return state
    return {name: parameter.part_of(value) for name, value in state.items()}
