"""Rules read records and report findings; the engine makes incidents of them. Needs numpy alone: no torch.

A rule is frozen settings and a pure function of (state, record), so the same code judges a live run and a logged one.
"""

from __future__ import annotations

from ..records import snake_case
from ._acts import actions_of, can_decide, has_limit, then_of, treatments_of
from ._ahead import DormantUnitsGrowing, ResidualGrowing, StepsTooLong
from ._attention import AttentionEntropyCollapse, AttentionLogitsGrowing, LogitsDrift
from ._beginning import BlownUp, Crawling, MistakenLoss
from ._data import RepeatedBatch, RepeatedTargets, TargetOutliers, TargetScale
from ._engine import RuleEngine, RuleMemory
from ._experts import IdleExperts
from ._exploding import Exploding
from ._findings import Findings, format_findings
from ._gradients import Dead, Vanishing
from ._graph import CutOff, SeesFuture
from ._growth import GradientGrowth
from ._judgement import Fired, Judgement, RuleCoverage
from ._kinds import kinds_of_index
from ._learning import ConstantOutput, NotLearning
from ._loss import BadInitialLoss, Diverging, LossSpike, Undertrained
from ._non_finite import NonFinite
from ._pairs import LeakedTargets, LossTerms, TargetsShifted, TooGood, WholeTargets, WrongObjective
from ._players import NoContest, OneSided
from ._precision import UpdatesRoundedAway
from ._restarted import Restarted
from ._rule import RULE, Rule, as_rule
from ._rulebook import INHIBITS, RuleBook, Silence
from ._run import AmpOverflow, ClipTooOften, DeadSignal, GradConflict, GradNotReset, RankDivergence, Stalled
from ._settings import (
    BatchNormStatistics,
    DropoutTooLarge,
    EpsilonTooLarge,
    EvalMode,
    LearningRateGone,
    WeightDecayTooLarge,
    WeightsOverwritten,
)
from ._silent import RecomputationDiffers, RepeatedOrder, SameBatchesOnRanks
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
    LearningRateGone,
    WeightDecayTooLarge,
    EpsilonTooLarge,
    EvalMode,
    BatchNormStatistics,
    TargetsShifted,
    WholeTargets,
    LossTerms,
    IdleExperts,
    Restarted,
    WeightsOverwritten,
    SeesFuture,
    CutOff,
    RepeatedBatch,
    RepeatedTargets,
    TargetOutliers,
    TargetScale,
    DropoutTooLarge,
    OneSided,
    NoContest,
    LeakedTargets,
    WrongObjective,
    TooGood,
    AttentionLogitsGrowing,
    AttentionEntropyCollapse,
    LogitsDrift,
    StepsTooLong,
    DormantUnitsGrowing,
    ResidualGrowing,
    UpdatesRoundedAway,
    RecomputationDiffers,
    RepeatedOrder,
    SameBatchesOnRanks,
    Expression,
)

RULES: dict[str, type[Rule]] = {snake_case(rule.__name__): rule for rule in _CATALOGUE}
"""Every built-in rule by its name."""

__all__ = [
    "INHIBITS",
    "RULE",
    "RULES",
    "ActScale",
    "AmpOverflow",
    "AttentionEntropyCollapse",
    "AttentionLogitsGrowing",
    "BadInitialLoss",
    "BatchNormStatistics",
    "BlownUp",
    "ClipTooOften",
    "ConstantLabels",
    "ConstantOutput",
    "Crawling",
    "CutOff",
    "Dead",
    "DeadSignal",
    "DeadUnits",
    "Diverging",
    "DormantUnitsGrowing",
    "DropoutTooLarge",
    "EpsilonTooLarge",
    "EvalMode",
    "Exploding",
    "Expression",
    "Findings",
    "Fired",
    "GradConflict",
    "GradNotReset",
    "GradientGrowth",
    "IdleExperts",
    "Judgement",
    "LeakedTargets",
    "LearningRateGone",
    "LogitsDrift",
    "LossSpike",
    "LossTerms",
    "MistakenLoss",
    "NoContest",
    "NonFinite",
    "NotLearning",
    "NotUpdating",
    "OneSided",
    "OutputRange",
    "Overfit",
    "RankDivergence",
    "RecomputationDiffers",
    "RepeatedBatch",
    "RepeatedOrder",
    "RepeatedTargets",
    "ResidualGrowing",
    "Restarted",
    "Rule",
    "RuleBook",
    "RuleCoverage",
    "RuleEngine",
    "RuleMemory",
    "SameBatchesOnRanks",
    "Saturated",
    "SeesFuture",
    "Silence",
    "Stalled",
    "StepsTooLong",
    "SymmetricUnits",
    "TargetOutliers",
    "TargetScale",
    "TargetSemantics",
    "TargetsShifted",
    "TooGood",
    "TrainEvalMismatch",
    "Undertrained",
    "UnnormalisedInput",
    "UpdateTooLarge",
    "UpdateTooSmall",
    "UpdatesRoundedAway",
    "ValNotLearning",
    "Vanishing",
    "WeightDecayTooLarge",
    "WeightsOverwritten",
    "WholeTargets",
    "WrongObjective",
    "actions_of",
    "as_rule",
    "can_decide",
    "format_findings",
    "has_limit",
    "kinds_of_index",
    "then_of",
    "treatments_of",
]
