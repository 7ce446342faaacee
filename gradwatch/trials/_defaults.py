"""The changes that are tried unless told otherwise, in their order, and how those that are asked for are found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ._change import Change
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

__all__ = ["CHANGES", "chosen"]

CHANGES: tuple[Change, ...] = (
    # What is cheap to tell wrong first: where time is short, the last are not tried.
    PlainStep(),
    AllParameters(),
    TrainMode(),
    FiniteInputs(),
    MatchedShapes(),
    Logits(),
    Mean(),
    InitialRate(),
    Epsilon(),
    WeightDecay(),
    FullPrecision(),
    LiveStatistics(),
    LearningRate(0.1),
    LearningRate(10.0),
    WithoutBatch(),
    Clip(),
    NormalisedInputs(),
    ScaledTargets(),
    Attached(),
    MainTerm(),
    SumOverSample(),
    RobustLoss(),
    CrossEntropy(),
    NewStart(),
    LastActivation("no"),
    LastActivation("sigmoid"),
    LastActivation("softmax"),
    HiddenReLU(),
    ShiftedTargets(1),
    ShiftedTargets(-1),
    RolledRows(1),
    RolledRows(-1),
    Negated(),
    NoAutocast(),
    Unfrozen(),
    Unclipped(),
    NoDropout(),
    EvalMode(),
    FreshMoments(),
    WarmUp(),
    Beta2(0.999),
    Beta2(0.95),
    LearningRate(0.01),
    LearningRate(100.0),
)


def chosen(changes: Any) -> tuple[Change, ...]:
    """Return the changes that are asked for: None all of `CHANGES`; else some, by name or as objects.

    Raises:
        ConfigError: something that is no change; `UnknownNameError` for a name that is not known.
    """
    if changes is None:
        return CHANGES
    given = [changes] if isinstance(changes, (str, Change)) else changes
    if not isinstance(given, Iterable):
        raise ConfigError(f"what_if: `changes` takes changes or their names. Got {type(changes).__name__}.")
    found = tuple(map(_one, given))
    names = [change.name for change in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"what_if: two changes are called {double!r}: give each a name of its own.")
    if not found:
        raise ConfigError("what_if: `changes` holds none.")
    return found


def _one(given: Any) -> Change:
    if isinstance(given, str):
        known = {change.name: change for change in CHANGES}
        if given not in known:
            raise UnknownNameError("change", given, known, where="what_if")
        return known[given]
    if not isinstance(given, Change) or not given.name:
        what = f"{type(given).__name__} without a `name`" if isinstance(given, Change) else repr(given)
        raise ConfigError(f"what_if: `changes` takes changes or their names. Got {what}.")
    return given
