"""Doors for one purpose each: a `GradWatch` that is set up for it. Several work side by side in one Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ..treatments import ClipByGlobalNorm, QuantileClip, SkipStep, Surgery, ZClip
from .lightning import GradWatch

__all__ = ["AutoClip", "GradientSurgery", "HistogramLogger"]

_CLIPS: dict[str, Callable[..., Any]] = {
    "norm": ClipByGlobalNorm,
    "quantile": partial(QuantileClip, 0.9),
    "zclip": ZClip,
}
"""Ways for `AutoClip` to find its bound. The 90th percentile: the 10th, as published, slows healthy runs."""


def AutoClip(  # noqa: N802 - used as a class
    method: str | None = None, *, max_norm: float | None = None, name: str = "autoclip", **options: Any
) -> GradWatch:
    """Return a GradWatch that clips spikes and skips batches whose gradients are not finite.

    Args:
        method: None: the preset `autoclip`, which clips only what its rules call a spike, to the rule's own bound.
            `"zclip"`, `"quantile"` (the 90th percentile): at every step, to a bound from past norms. `"norm"`: at every
            step, to `max_norm`.
        max_norm: for `"norm"`; stands for it where no method is named.
        name: see `GradWatch`.
        **options: of `GradWatch`.

    Raises:
        ConfigError: there is no such method; `"norm"` without `max_norm`, or `max_norm` with another method.
    """
    if method is None and max_norm is None:
        return GradWatch("autoclip", name=name, **options)
    chosen = method or "norm"
    if chosen not in _CLIPS:
        raise UnknownNameError("clip", chosen, _CLIPS)
    if (chosen == "norm") != (max_norm is not None):
        raise ConfigError(f"AutoClip: `max_norm` belongs to the method 'norm'. Got {chosen!r} and max_norm={max_norm}.")
    clip = ClipByGlobalNorm(max_norm) if max_norm is not None else _CLIPS[chosen]()
    return GradWatch("default", treatments=[clip, SkipStep()], name=name, **options)


def GradientSurgery(  # noqa: N802 - used as a class
    method: str = "pcgrad", *, when: str = "conflict", name: str = "surgery", **options: Any
) -> GradWatch:
    """Return a GradWatch that combines task gradients by a method of surgery.

    Args:
        method: see `gradwatch.treatments.surgery.METHODS`.
        when: `"conflict"`: where some pair of tasks conflicts; `"always"`.
        name: see `GradWatch`.
        **options: of `GradWatch`.
    """
    return GradWatch("default", surgery=Surgery(method, when=when), name=name, **options)


def HistogramLogger(  # noqa: N802 - used as a class
    every: int = 100, *, paths: Any = "*", scale: str = "log10", name: str = "histograms", **options: Any
) -> GradWatch:
    """Return a GradWatch that logs histograms of gradients, and judges nothing.

    Args:
        every: optimizer steps between two.
        paths: glob patterns of the parameters.
        scale: `"log10"` of the magnitude, or `"signed"` values.
        name: see `GradWatch`.
        **options: of `GradWatch`.
    """
    settings = {"activations_every": None, "updates_every": None, "verbose": False, "run_dir": False}
    kept = {"histograms_every": every, "log_every": every, "histogram_scale": scale, "paths": paths, "name": name}
    return GradWatch("observe", **{**settings, **kept, **options})
