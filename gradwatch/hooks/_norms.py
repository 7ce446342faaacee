"""What a norm does to the numbers it is given, told by trying it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["norm_of"]

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")


def norm_of(module: Any, width: int) -> tuple[Tensor, float, bool]:
    """Return (gain, eps, whether it centres) of a norm, told by what it makes of some numbers.

    Raises:
        ConfigError: it is neither a layer norm nor one by the root mean square.
    """
    weight = getattr(module, "weight", None)
    eps = next((float(e) for n in _EPS if isinstance(e := getattr(module, n, None), (int, float))), 0.0)
    like = weight if isinstance(weight, Tensor) else torch.ones(width)
    numbers = torch.arange(3 * width, device=like.device, dtype=torch.float32).mul(1.7).sin().add(0.3)
    given, other, _ = numbers.to(like.dtype).reshape(3, 1, 1, width)
    with torch.no_grad():
        one, opposite, made = (type(module).forward(module, t).double() for t in (given, -given, other))
    for centred in (False, True):
        unit, unit_of_other = (_unit(t.double(), eps, centred=centred) for t in (given, other))
        gain, bias = (one - opposite) / 2 / unit, (one + opposite) / 2
        if torch.allclose(gain * unit_of_other + bias, made, rtol=1e-3, atol=_slack(like.dtype, made)):
            return gain.reshape(-1).to(torch.promote_types(like.dtype, torch.float32)), eps, centred
    raise ConfigError(
        f"{type(module).__name__} is no layer norm, and none by the root mean square: parts can't go through it."
    )


def _unit(tensor: Tensor, eps: float, *, centred: bool) -> Tensor:
    tensor = tensor - tensor.mean(dim=-1, keepdim=True) if centred else tensor
    return tensor / (tensor.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _slack(dtype: torch.dtype, made: Tensor) -> float:
    return 32 * torch.finfo(dtype).eps * max(float(made.abs().max()), 1.0)
