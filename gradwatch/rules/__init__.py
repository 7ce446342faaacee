"""Rules read records and report findings; the engine makes incidents of them. Needs numpy alone: no torch.

A rule is frozen settings and a pure function of (state, record), so the same code judges a live run and a logged one.
"""

from __future__ import annotations

from ._beginning import BlownUp, Crawling, MistakenLoss
from ._engine import RuleEngine
from ._exploding import Exploding
from ._findings import Findings, format_findings
from ._gradients import Dead, Vanishing
from ._growth import GradientGrowth
from ._judgement import Fired, Judgement, RuleCoverage
from ._learning import ConstantOutput, NotLearning
from ._loss import BadInitialLoss, Diverging, LossSpike, Undertrained
from ._non_finite import NonFinite
from ._rule import Rule, snake_case
from ._rulebook import INHIBITS, RuleBook, Silence
from ._run import AmpOverflow, ClipTooOften, DeadSignal, GradConflict, GradNotReset, RankDivergence, Stalled
from ._targets import ConstantLabels, OutputRange, TargetSemantics, UnnormalisedInput
from ._units import ActScale, DeadUnits, Saturated, SymmetricUnits
from ._updates import NotUpdating, UpdateTooLarge, UpdateTooSmall
from ._validation import Overfit, TrainEvalMismatch, ValNotLearning
from .expression import Expression

_CATALOGUE: tuple[type[Rule], ...] = (
    NonFinite,
    Exploding,
    Vanishing,
    Dead,
    NotUpdating,
    UpdateTooLarge,
    UpdateTooSmall,
    NotLearning,
    ConstantOutput,
    LossSpike,
    Diverging,
    BlownUp,
    Crawling,
    MistakenLoss,
    GradientGrowth,
    DeadUnits,
    Saturated,
    ActScale,
    BadInitialLoss,
    SymmetricUnits,
    OutputRange,
    TargetSemantics,
    UnnormalisedInput,
    ConstantLabels,
    Overfit,
    ValNotLearning,
    TrainEvalMismatch,
    Undertrained,
    ClipTooOften,
    AmpOverflow,
    GradNotReset,
    GradConflict,
    Stalled,
    RankDivergence,
    DeadSignal,
    Expression,
)

RULES: dict[str, type[Rule]] = {snake_case(rule.__name__): rule for rule in _CATALOGUE}
"""Every built-in rule by its name."""

__all__ = [
    "INHIBITS",
    "RULES",
    "Findings",
    "Fired",
    "Judgement",
    "Rule",
    "RuleBook",
    "RuleCoverage",
    "RuleEngine",
    "Silence",
    "format_findings",
    *[rule.__name__ for rule in _CATALOGUE],
]
