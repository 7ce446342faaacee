"""Every treatment, at every step and behind a rule."""

from __future__ import annotations

from collections.abc import Callable

import gradwatch.treatments as t
from gradwatch.rules import Exploding

from ..loops import Loop, adamw, faults, momentum, still
from ..places import Place
from ..story import Story
from ._registry import scenario
from .faults import EARLY

TREATMENTS: dict[str, Callable[[], object]] = {
    "clip_by_global_norm": lambda: t.ClipByGlobalNorm(0.2),
    "clip_by_norm": lambda: t.ClipByNorm(0.1),
    "clip_by_value": lambda: t.ClipByValue(0.02),
    "adaptive_clip": lambda: t.AdaptiveClip(0.05),
    "zclip": lambda: t.ZClip(warmup=4),
    "quantile_clip": lambda: t.QuantileClip(0.5, window=8),
    "ema_clip": lambda: t.EmaClip(warmup=3),
    "scale": lambda: t.Scale(0.5),
    "centralize": lambda: t.Centralize(),
    "noise": lambda: t.Noise(eta=1e-4),
    "sanitize": lambda: t.Sanitize(),
    "spike_clip": lambda: t.SpikeClip(2.0),
    "normalize": lambda: t.Normalize(),
    "clip_error_signals": lambda: t.ClipByNorm(0.01, at="grad_output"),
    "scale_error_signals": lambda: t.Scale(0.5, paths=["0"], at="grad_output"),
}


def _at_every_step(name: str) -> Callable[[Place], Story]:
    def run(place: Place) -> Story:
        optimizer = adamw if name == "spike_clip" else momentum
        loop = Loop(place, optimizer=optimizer, treatments=[TREATMENTS[name]()])
        # A small spike, and a step that no treatment may learn from.
        story = loop.run(14, faults({9: 30.0, 11: float("inf")})).story()
        assert len(story.records) == 14
        return story

    run.__name__ = f"{name}_at_every_step"
    return run


def _behind_a_rule(name: str) -> Callable[[Place], Story]:
    def run(place: Place) -> Story:
        loop = Loop(place, optimizer=still, rules=[Exploding(**EARLY, then=TREATMENTS[name]())])
        # The rule's first limit is made of eight norms, and the latest of these arrive up to five steps late.
        return loop.run(15, faults({12: 1e4})).story()

    run.__name__ = f"{name}_behind_a_rule"
    return run


for _name in TREATMENTS:
    scenario(rtol=1e-3, seldom=True)(_at_every_step(_name))
    if "signals" not in _name:
        scenario(rtol=1e-3, limits=0.05, seldom=True)(_behind_a_rule(_name))
