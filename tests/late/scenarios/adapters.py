"""Trainers: their own loops on the late device, through an accelerator of their kind."""

from __future__ import annotations

import math
from typing import Any

import torch

from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import ClipByGlobalNorm, SkipStep, Stop

from ..places import Place
from ..story import Story
from ._registry import scenario
from .faults import EARLY


def trained(*given: Any, **options: Any) -> Story:
    # Lightning takes seconds to import, and only the process that trains needs it.
    from ..lightning_loop import trained

    return trained(*given, **options)


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-6, fused=True)


@scenario(needs_device=True)
def lightning_skips_a_nan(place: Place) -> Story:
    story = trained(place, 10, {5: math.nan}, still, rules=[NonFinite()], treatments=[SkipStep()])
    assert story.rules == [("non_finite", 5)]
    assert story.record(5).skipped
    return story


@scenario(needs_device=True, limits=0.05)
def lightning_accumulates_and_clips(place: Place) -> Story:
    return trained(place, 14, {11: 1e4}, still, 2, rules=[Exploding(**EARLY)], treatments=[ClipByGlobalNorm(1.0)])


@scenario(needs_device=True, actions=True)
def lightning_is_stopped_by_a_rule(place: Place) -> Story:
    story = trained(place, 20, {5: math.nan}, still, rules=[NonFinite(then=Stop("enough"))], treatments=[SkipStep()])
    story.requests.append(("stop", story.records[-1].step))
    assert len(story.records) < 16
    return story
