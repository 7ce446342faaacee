"""Checks of propagation: does a difference between samples reach the output, and a gradient the first layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from ._report import PreflightFinding
from ._trace import ModuleTrace
from ._trial import Trial

__all__ = ["finite", "gradient_propagation", "initial_scale", "saturated_units", "signal_propagation", "silent_units"]

Findings = Iterable[PreflightFinding]

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_SQUASHERS = (nn.Sigmoid, nn.Tanh, nn.Softsign)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)

_REMEDY = "He or Glorot initialisation; ReLU or tanh in hidden layers; normalisation; residual connections"

SIGNAL_FADED = 1e-4
GRADIENT_FADED = 1e-3
GRADIENT_GROWN = 1e3
OUTPUT_GROWN = 100.0
MOST_SILENT = 0.9
MOST_SATURATED = 0.9


def finite(trial: Trial) -> Findings:
    """Outputs, loss and gradients are finite; else the first module whose output is not while its input is."""
    bad = [m for m in trial.trace.modules if not m.is_finite]
    born = next((m for m in bad if m.input_is_finite), None)
    if bad:
        where = born or bad[0]
        yield PreflightFinding(
            check="non_finite",
            severity="critical",
            path=where.path,
            message=f"the output of {type(where.module).__name__} is not finite"
            + (" though its input is" if where.input_is_finite else ", nor is its input"),
            cause="overflow (exp, division, huge weights or inputs), or nan in the data",
            advice="normalise the inputs, scale the initialisation, keep exp() and log() in range",
        )
    elif not math.isfinite(trial.trace.loss):
        yield PreflightFinding(
            check="non_finite",
            severity="critical",
            message=f"the loss of finite outputs is {trial.trace.loss}",
            cause="log(0), a division by zero, or nan in the targets",
            advice="use a loss that takes logits (cross_entropy, binary_cross_entropy_with_logits); clamp before log()",
            value=trial.trace.loss,
        )


def signal_propagation(trial: Trial) -> Findings:
    """Differences between samples reach the output: their share of the signal must not fade with depth."""
    shares = [(m, m.spread / m.rms) for m in trial.lively.modules if m.rms > 0 and m.spread == m.spread]
    if len(shares) < 2 or not trial.is_finite:
        return
    first, last = shares[0][1], shares[-1][1]
    trial.measures["signal_gain"] = last / first if first > 0 else float("nan")
    if not first > 1e-6 or last >= SIGNAL_FADED or _is_one_unit_softmax(shares[-1][0]):
        return
    where = next(m for m, share in shares if share < SIGNAL_FADED)
    yield PreflightFinding(
        check="signal_vanishes",
        path=where.path,
        message=f"samples differ by {first:.2g} of the signal at first and by {last:.2g} at the output",
        cause="too small weights, saturating or averaging activations (sigmoid, softmax), or depth without skips",
        advice="He or Glorot initialisation; ReLU or tanh in hidden layers; normalisation; residual connections",
        value=last,
        limit=SIGNAL_FADED,
    )


def gradient_propagation(trial: Trial) -> Findings:
    """The gradient's norm at the first weighted module against that at the last."""
    deltas = [(m, m.delta) for m in trial.lively.modules if m.delta and _has_weight(m)]
    if len(deltas) < 2 or not trial.is_finite:
        return
    (first, at_first), (_, at_last) = deltas[0], deltas[-1]
    ratio = at_first / at_last
    trial.measures["gradient_gain"] = ratio
    if ratio < GRADIENT_FADED or ratio > GRADIENT_GROWN:
        fades = ratio < 1
        yield PreflightFinding(
            check="gradient_vanishes" if fades else "gradient_explodes",
            path=first.path,
            message=f"its gradient is {ratio:.2g} times that of the last layer ({len(deltas)} layers later)",
            cause="saturating activations, small weights or depth without skips"
            if fades
            else "large weights, times depth",
            advice=_REMEDY,
            value=ratio,
            limit=GRADIENT_FADED if fades else GRADIENT_GROWN,
        )


def initial_scale(trial: Trial) -> Findings:
    """What the layers multiply differences between samples by, all together, where nothing normalises them."""
    weighted = [m for m in trial.trace.modules if _has_weight(m) and m.is_finite and m.spread == m.spread]
    if not weighted or any(isinstance(m.module, _NORMS) for m in trial.trace.modules):
        return
    largest = max(weighted, key=lambda m: m.spread)
    inputs = [m for m in trial.trace.modules if m.takes_batch and m.input_rms > 0]
    if not inputs:
        return
    gain = largest.spread / inputs[0].input_rms
    trial.measures["largest_gain"] = gain
    if gain > OUTPUT_GROWN:
        yield PreflightFinding(
            check="activations_grow",
            path=largest.path,
            message=f"its outputs differ between samples by {gain:.3g} times the size of the batch",
            cause="weights drawn without regard to the number of inputs (N(0, 1), say)",
            advice="He or Glorot initialisation: variance 2 / fan_in or 2 / (fan_in + fan_out)",
            value=gain,
            limit=OUTPUT_GROWN,
        )


def silent_units(trial: Trial) -> Findings:
    """Rectified units that are above zero for no sample of the batch."""
    if trial.batch_size < 8:
        return
    for m in trial.trace.modules:
        if isinstance(m.module, _RECTIFIERS[:2]) and m.silent_share > MOST_SILENT and not m.is_empty:
            yield PreflightFinding(
                check="dead_units",
                path=m.path,
                message=f"{m.silent_share:.0%} of its units are silent for the whole batch",
                cause="unnormalised inputs, a negative bias, or an initialisation that drives them below zero",
                advice="normalise the inputs; He initialisation; LeakyReLU or GELU",
                value=m.silent_share,
                limit=MOST_SILENT,
            )


def saturated_units(trial: Trial) -> Findings:
    """Sigmoid or tanh units that sit on their flat ends."""
    for m in trial.trace.modules:
        if isinstance(m.module, _SQUASHERS) and m.saturated_share > MOST_SATURATED:
            yield PreflightFinding(
                check="saturated",
                path=m.path,
                message=f"{m.saturated_share:.0%} of its inputs lie beyond ±5, where its slope is near 0",
                cause="unnormalised inputs or too large weights",
                advice="normalise the inputs; Glorot initialisation; normalisation before it",
                value=m.saturated_share,
                limit=MOST_SATURATED,
            )


def _has_weight(m: ModuleTrace) -> bool:
    return any(p.dim() >= 2 for p in m.module.parameters(recurse=False))


def _is_one_unit_softmax(m: ModuleTrace) -> bool:
    return isinstance(m.module, nn.Softmax) and m.output.shape[-1] == 1
