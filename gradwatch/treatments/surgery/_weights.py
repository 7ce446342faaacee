"""From a Gramian to one weight a task: names resolved, scale taken out, result checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnknownNameError
from ._balance import aligned_mtl, config, fairgrad, imtl_g, nash_mtl
from ._cone import cagrad, dualproj, mgda, upgrad
from ._projection import GradVac, pcgrad

__all__ = ["METHODS", "resolve_method", "weights"]


def mean(gramian: Tensor) -> Tensor:
    """Return 1/k for each task."""
    return torch.full((len(gramian),), 1 / len(gramian), dtype=gramian.dtype)


def sum_(gramian: Tensor) -> Tensor:
    """Return 1 for each task: the plain sum of the losses."""
    return torch.ones(len(gramian), dtype=gramian.dtype)


def gradvac(gramian: Tensor, *, beta: float = 0.01, targets: Tensor | None = None, step: int = 0) -> Tensor:
    """Return Gradient Vaccine's weights for given target cosines (0 where none), without remembering anything."""
    vaccine = GradVac(beta=beta)
    vaccine.targets = None if targets is None else targets.to("cpu", torch.float64, copy=True)
    return vaccine(gramian, step=step)


METHODS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "aligned_mtl": aligned_mtl,
        "cagrad": cagrad,
        "config": config,
        "dualproj": dualproj,
        "fairgrad": fairgrad,
        "gradvac": gradvac,
        "imtl_g": imtl_g,
        "mean": mean,
        "mgda": mgda,
        "nash_mtl": nash_mtl,
        "pcgrad": pcgrad,
        "sum": sum_,
        "upgrad": upgrad,
    }
)
"""Every method that has a name: (gramian, **options) -> weights."""


def weights(method: str | Callable[..., Any], gramian: Tensor, *, step: int = 0, **options: Any) -> Tensor:
    """Return the weight of each task, so that the combined gradient is the weighted sum of the task gradients.

    Args:
        method: a name in `METHODS`, or a callable from a (k, k) Gramian to (k,) weights (torchjd's weightings, and its
            aggregators that work on Gramians, are such callables).
        gramian: (k, k), inner products of the task gradients. Any dtype and device; finite.
        step: seeds the methods that draw an order (pcgrad, gradvac).
        **options: of the method (`c` of cagrad, `alpha` of fairgrad, `pref`, ...).

    Returns:
        (k,) float64 on the CPU. The direction doesn't depend on the gradients' common scale. A Gramian of zeros gives
        1/k everywhere.

    Raises:
        UnknownNameError: no such method or option.
        ConfigError: the Gramian is not square, not finite, or the method returned something else than k numbers.
    """
    function = resolve_method(method, options)
    G = _checked(gramian)
    if not float(G.diagonal().sum()) > 0:
        return mean(G)
    if isinstance(method, str) and "step" in _settings_of(method):
        options = {**options, "step": step}
    result = torch.as_tensor(function(G, **options)).detach().to("cpu", torch.float64)
    if result.shape != (len(G),):
        raise ConfigError(
            f"surgery method {_name(method)!r} must return {len(G)} weights for a Gramian of {len(G)} tasks. "
            f"Got shape {tuple(result.shape)}."
        )
    return result


def resolve_method(method: str | Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function behind a name or a torchjd object, after checking that it takes these options."""
    if isinstance(method, str):
        if method not in METHODS:
            raise UnknownNameError("surgery method", method, METHODS)
        known = [name for name in _settings_of(method) if name not in {"gramian", "step", "targets"}]
        for name in options:
            if name not in known and not (method == "gradvac" and name == "targets"):
                raise UnknownNameError(f"option of {method}", name, known)
        return METHODS[method]
    function = getattr(method, "gramian_weighting", method)
    if not callable(function):
        raise ConfigError(
            f"a surgery method is a name or a callable from a Gramian to weights. Got {type(method).__name__}. "
            f"Names: {', '.join(METHODS)}."
        )
    return function


@cache
def _settings_of(method: str) -> tuple[str, ...]:
    return tuple(signature(METHODS[method]).parameters)


def _checked(gramian: Tensor) -> Tensor:
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise ConfigError(f"a Gramian is a square matrix, one row a task. Got shape {tuple(gramian.shape)}.")
    G = gramian.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(G).all()):
        bad = (~torch.isfinite(G)).any(1).nonzero().flatten().tolist()
        raise ConfigError(f"the Gramian is not finite: tasks {bad} have inner products that are nan or inf.")
    return G


def _name(method: str | Callable[..., Any]) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
