"""What if: a training tried again on copies, with one thing changed at a time. Public as `gradwatch.what_if`."""

from __future__ import annotations

from ..records import Tried, WhatIf
from ._change import Change, NotApplicable
from ._defaults import CHANGES
from ._of_data import FiniteInputs, NormalisedInputs, RolledRows, ScaledTargets, ShiftedTargets, WithoutBatch
from ._of_losses import CrossEntropy, Logits, MainTerm, MatchedShapes, Mean, Negated, RobustLoss, SumOverSample
from ._of_models import (
    Attached,
    EvalMode,
    FullPrecision,
    HiddenReLU,
    LastActivation,
    LiveStatistics,
    NewStart,
    NoAutocast,
    NoDropout,
    PlainStep,
    TrainMode,
)
from ._of_optimizers import (
    AllParameters,
    Beta2,
    Clip,
    Epsilon,
    FreshMoments,
    InitialRate,
    LearningRate,
    Unclipped,
    Unfrozen,
    WarmUp,
    WeightDecay,
)
from ._stage import bytes_of, copy_of, modules_of, why_not_copied
from ._trial import Course, Trial
from ._what_if import Bench, what_if

__all__ = [
    "CHANGES",
    "AllParameters",
    "Attached",
    "Bench",
    "Beta2",
    "Change",
    "Clip",
    "Course",
    "CrossEntropy",
    "Epsilon",
    "EvalMode",
    "FiniteInputs",
    "FreshMoments",
    "FullPrecision",
    "HiddenReLU",
    "InitialRate",
    "LastActivation",
    "LearningRate",
    "LiveStatistics",
    "Logits",
    "MainTerm",
    "MatchedShapes",
    "Mean",
    "Negated",
    "NewStart",
    "NoAutocast",
    "NoDropout",
    "NormalisedInputs",
    "NotApplicable",
    "PlainStep",
    "RobustLoss",
    "RolledRows",
    "ScaledTargets",
    "ShiftedTargets",
    "SumOverSample",
    "TrainMode",
    "Trial",
    "Tried",
    "Unclipped",
    "Unfrozen",
    "WarmUp",
    "WeightDecay",
    "WhatIf",
    "WithoutBatch",
    "bytes_of",
    "copy_of",
    "modules_of",
    "what_if",
    "why_not_copied",
]
