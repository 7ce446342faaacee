"""Checks of outputs against targets: shapes, ranges, and what the last activation can reach."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._report import PreflightFinding
from ._trial import Trial

__all__ = ["constant_targets", "output_range", "output_shape", "output_units", "unnormalised_inputs"]

Findings = Iterable[PreflightFinding]

RANGES: tuple[tuple[type[nn.Module], float, float], ...] = (
    (nn.Sigmoid, 0.0, 1.0),
    (nn.Softmax, 0.0, 1.0),
    (nn.Tanh, -1.0, 1.0),
    (nn.Softsign, -1.0, 1.0),
    (nn.ReLU, 0.0, float("inf")),
    (nn.ReLU6, 0.0, 6.0),
    (nn.Softplus, 0.0, float("inf")),
    (nn.Hardtanh, -1.0, 1.0),
)
LARGEST_INPUT = 20.0
SMALLEST_INPUT = 0.01


def last_activation(trial: Trial) -> nn.Module | None:
    """Return the module whose output is the model's output, if it is an activation."""
    last = trial.trace.last
    if last is None or trial.outputs is None or last.output.shape != trial.outputs.shape:
        return None
    # Something after the last module (a sum, a functional softmax) makes its range meaningless.
    return last.module if torch.equal(last.output.detach(), trial.outputs) else None


def output_shape(trial: Trial) -> Findings:
    """Outputs and float targets have one shape, or ones that do not stretch each other."""
    outputs, targets = trial.outputs, trial.task.targets
    if outputs is None or not isinstance(targets, Tensor) or not targets.is_floating_point():
        return
    if outputs.shape == targets.shape or trial.task.takes_model or trial.task.loss_fn is None:
        return
    try:
        together = torch.broadcast_shapes(outputs.shape, targets.shape)
    except RuntimeError:
        return
    if together.numel() > max(outputs.numel(), targets.numel()):
        yield PreflightFinding(
            check="shape_mismatch",
            severity="critical",
            message=f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} broadcast to {tuple(together)}",
            cause="a missing squeeze() or unsqueeze()",
            advice=f"bring both to shape {tuple(outputs.shape)}, e.g. targets.reshape_as(outputs)",
            value=together.numel(),
            limit=max(outputs.numel(), targets.numel()),
        )


def output_units(trial: Trial) -> Findings:
    """The last activation can tell samples apart: no softmax over one unit, no ReLU before a classifier's loss."""
    last = last_activation(trial)
    if last is None or trial.outputs is None:
        return
    if isinstance(last, nn.Softmax) and trial.outputs.dim() >= 2 and trial.outputs.shape[-1] == 1:
        yield PreflightFinding(
            check="constant_output",
            severity="critical",
            path=_path_of(trial, last),
            message="a softmax over one unit is always 1, and its gradient always 0",
            cause="softmax where sigmoid was meant",
            advice="a sigmoid (or none, with binary_cross_entropy_with_logits); no activation for regression",
            value=1,
            limit=2,
        )
    if isinstance(last, (nn.ReLU, nn.ReLU6)) and trial.task.is_classification:
        yield PreflightFinding(
            check="output_activation",
            severity="warning",
            path=_path_of(trial, last),
            message="a classifier's outputs pass through ReLU: units below zero are cut and get no gradient",
            cause="an activation behind every layer, the last one too",
            advice="no activation, with a loss on logits; or softmax (sigmoid), with one on probabilities",
        )


def output_range(trial: Trial) -> Findings:
    """Targets lie where the last activation can reach, and rows sum to what softmax sums to."""
    targets, last = trial.task.targets, last_activation(trial)
    if last is None or not isinstance(targets, Tensor) or not targets.is_floating_point() or not targets.numel():
        return
    low, high = next(((a, b) for kind, a, b in RANGES if isinstance(last, kind)), (-float("inf"), float("inf")))
    least, most = targets.min().item(), targets.max().item()
    if least < low - 1e-6 or most > high + 1e-6:
        share = ((targets < low - 1e-6) | (targets > high + 1e-6)).double().mean().item()
        yield PreflightFinding(
            check="output_range",
            severity="critical",
            path=_path_of(trial, last),
            message=f"{type(last).__name__} gives {low:g} to {high:g}, targets are {least:.4g} to {most:.4g}: "
            f"{share:.0%} of them are out of reach",
            cause="an activation after the last layer of a regression, or targets that were not scaled",
            advice="no activation after the last layer; or scale the targets into its range",
            value=share,
            limit=0.0,
        )
    elif isinstance(last, nn.Softmax) and trial.outputs is not None and targets.shape == trial.outputs.shape:
        sums = targets.sum(-1)
        wrong = (sums - 1).abs() > 1e-3
        if targets.shape[-1] > 1 and bool(wrong.any()):
            yield PreflightFinding(
                check="target_semantics",
                severity="critical",
                path=_path_of(trial, last),
                message=f"softmax outputs sum to 1, rows of targets to {sums.min():.4g} to {sums.max():.4g}",
                cause="softmax where several labels may hold at once",
                advice="a sigmoid per label with binary cross-entropy (binary_cross_entropy_with_logits)",
                value=wrong.double().mean().item(),
                limit=0.0,
            )


def constant_targets(trial: Trial) -> Findings:
    """Targets differ within the batch. A remark where two classes may leave a small batch with one by chance."""
    wanted = trial.wanted if trial.wanted is not None else trial.task.targets
    if not isinstance(wanted, Tensor) or wanted.dim() == 0 or wanted.shape[0] < 8 or wanted is trial.task.inputs:
        return
    if bool((wanted != wanted[:1]).any()):
        return
    units = wanted.shape[1] if wanted.dim() > 1 else 1
    by_chance = trial.task.is_classification and (units <= 2 or wanted.shape[0] < 24)
    yield PreflightFinding(
        check="constant_labels",
        severity="info" if by_chance else "warning",
        message=f"all {wanted.shape[0]} targets of the batch are the same",
        cause="labels divided, cast or overwritten on the way; data sorted by class and not shuffled",
        advice="look at the raw labels; shuffle",
        value=1,
        limit=2,
    )


def unnormalised_inputs(trial: Trial) -> Findings:
    """Floats that go straight into a weighted layer are of size 1 or so."""
    weighted = next((m for m in trial.trace.modules if list(m.module.parameters(recurse=False))), None)
    if weighted is None or not _multiplies(weighted.module) or not weighted.input_is_finite:
        return
    mean, std, largest = weighted.input_mean, weighted.input_std, weighted.input_absmax
    if abs(mean) > LARGEST_INPUT or std > LARGEST_INPUT:
        said, limit = f"inputs have mean {mean:.3g} and standard deviation {std:.3g}", LARGEST_INPUT
    elif 0 < largest < SMALLEST_INPUT:
        said, limit = f"the largest input is {largest:.2g}", SMALLEST_INPUT
    else:
        return
    yield PreflightFinding(
        check="unnormalised_input",
        path=weighted.path,
        message=said,
        cause="raw features or pixels; or normalised twice",
        advice="subtract the training data's mean and divide by its standard deviation, once, feature by feature",
        value=max(abs(mean), std) if limit == LARGEST_INPUT else largest,
        limit=limit,
    )


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase))


def _path_of(trial: Trial, module: nn.Module) -> str:
    return next((path for path, m in trial.model.named_modules() if m is module), "")
