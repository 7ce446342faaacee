"""Checks of the loss alone: what it says of outputs that we choose.

No model is run. The loss is asked for its gradient at equal outputs for all samples, for its value at perfect outputs,
and whether one sample's gradient depends on another's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ._outputs import last_activation
from ._report import PreflightFinding
from ._trial import NotChecked, Trial

__all__ = ["initial_loss", "loss_coupling", "loss_gradient", "loss_pairing", "reachable_loss"]

Findings = Iterable[PreflightFinding]

LARGEST_INITIAL = 3.0
LEAST_REACHABLE = 0.4
MOST_DEAF = 0.2


def initial_loss(trial: Trial) -> Findings:
    """The loss of k classes begins near ln k, whatever the model: three times that means confident nonsense.

    The constant predictor's loss is reported among the measures. Where the loss can't be tried on other outputs the
    cross-entropy of outputs and class indices stands for it.
    """
    wanted = trial.wanted
    if wanted is None:
        yield from _initial_scores(trial)
        return
    if not trial.is_finite:
        return
    baseline = _constant_loss(trial, wanted)
    if baseline is not None:
        trial.measures["loss_of_constant"] = baseline
    k = wanted.shape[1] if wanted.dim() > 1 and wanted.shape[1] > 1 else 2
    if not trial.task.is_classification or not _is_log_loss(trial, wanted):
        return
    yield from _above_chance(trial, trial.trace.loss, k)


def _above_chance(trial: Trial, loss: float, k: int) -> Findings:
    limit = LARGEST_INITIAL * math.log(k)
    trial.measures["ln_k"] = math.log(k)
    if loss > limit:
        yield PreflightFinding(
            check="bad_initial_loss",
            message=f"the loss begins at {loss:.4g}, a guess among {k} classes has {math.log(k):.3g}",
            cause="too large initial weights or inputs, a penalty, or a sum instead of a mean",
            advice="scale the initialisation of the last layer; normalise the inputs; loss averaged over the batch",
            value=loss,
            limit=limit,
        )


def _initial_scores(trial: Trial) -> Findings:
    """The cross-entropy of the outputs, where targets are the indices of their last dimension."""
    outputs, targets = trial.outputs, trial.task.targets
    indices = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool
    if outputs is None or not indices or outputs.shape[:-1] != targets.shape or outputs.shape[-1] < 2:
        raise NotChecked("no scores of classes and their indices were seen: the loss is computed elsewhere")
    k, flat = outputs.shape[-1], targets.reshape(-1).long()
    chosen = (flat >= 0) & (flat < k)
    if bool(chosen.any()) and trial.is_finite:
        loss = nn.functional.cross_entropy(outputs.reshape(-1, k)[chosen].float(), flat[chosen]).item()
        yield from _above_chance(trial, loss, k)


def loss_pairing(trial: Trial) -> Findings:
    """Where all outputs are equal, the gradient tells the samples apart by their targets, and points towards them."""
    trial.requires_lab()
    wanted, outputs = trial.wanted, trial.outputs
    if wanted is None or outputs is None or wanted.shape[0] < 4 or not _varies(wanted) or wanted is outputs:
        return
    # A loss with flat flanks (absolute error, Huber) tells samples apart only from between their targets.
    places = (outputs.mean(0, keepdim=True), wanted.mean(0, keepdim=True), wanted.median(0, keepdim=True).values)
    pulls = [pull for place in places if (pull := _gradient(trial, place.expand_as(outputs))) is not None]
    if not any(bool(pull.any()) for pull in pulls):
        return
    aim = _centred(wanted)
    shares = [_centred(pull).norm().item() / max(pull.double().norm().item(), 1e-300) for pull in pulls]
    if max(shares) < 1e-5:
        yield PreflightFinding(
            check="loss_pairing",
            severity="critical",
            message="the loss pulls all outputs the same way, whatever their targets: the two are not paired",
            cause="shapes that broadcast inside the loss, or a mean over targets before the comparison",
            advice="compare tensors of one shape; look at outputs.shape and targets.shape where they meet",
            value=max(shares),
            limit=1e-5,
        )
        return
    agreement = max(_cosine(-_centred(pull), aim) for pull in pulls)
    trial.measures["loss_agreement"] = agreement
    if agreement < -0.3:
        yield PreflightFinding(
            check="loss_sign",
            severity="critical",
            message=f"the loss pushes outputs away from their targets (correlation {agreement:.2f})",
            cause="a flipped sign: a log-likelihood or a score is minimised",
            advice="minimise the negative; or check the order of the loss's arguments",
            value=agreement,
            limit=-0.3,
        )


def reachable_loss(trial: Trial) -> Findings:
    """The best outputs that the last activation can give make the loss small; and better than outputs like targets."""
    trial.requires_lab()
    wanted, start = trial.wanted, trial.trace.loss
    if wanted is None or trial.outputs is None or not trial.is_finite or not start > 0 or not _varies(wanted):
        return
    values = {name: v for name, z in _ideals(trial, wanted) if (v := _value(trial, z)) is not None}
    if not values:
        return
    best = min(values.values())
    trial.measures["loss_of_perfect"] = best
    # Regression losses may have a floor of their own (a variance term): only classification has its minimum at 0.
    if best > LEAST_REACHABLE * start and trial.task.is_classification:
        yield PreflightFinding(
            check="loss_floor",
            message=f"even perfect outputs leave the loss at {best:.4g} of {start:.4g}",
            cause="softmax applied twice (a loss on logits behind a softmax), or a penalty that outweighs the loss",
            advice="give the loss logits; lower the penalty, or move it into the optimizer's weight_decay",
            value=best / start,
            limit=LEAST_REACHABLE,
        )
    elif best > 0.9 * start and _value(trial, trial.outputs) is not None:
        yield PreflightFinding(
            check="loss_floor",
            message=f"outputs equal to the targets leave the loss at {best:.4g} of {start:.4g}",
            cause="a penalty that outweighs the loss, or a loss that does not measure the distance to the targets",
            advice="print the terms of the loss one by one; lower the penalty",
            value=best / start,
            limit=0.9,
        )
    if not trial.task.is_classification:
        yield from _prefers_constant(trial, wanted, best)


def _prefers_constant(trial: Trial, wanted: Tensor, best: float) -> Findings:
    """Regression: one number for all samples must not be as good as the targets themselves."""
    levels = [
        *torch.quantile(wanted.flatten().double()[:100_000], torch.tensor([0.0, 0.5, 1.0]).double()).tolist(),
        1.0,
    ]
    constants = {c: _value(trial, torch.full_like(wanted, c)) for c in levels}
    found = {c: v for c, v in constants.items() if v is not None}
    scale = max(abs(trial.trace.loss), 1e-12)
    if found and min(found.values()) < best - 1e-3 * scale:
        level = min(found, key=lambda c: found[c])
        yield PreflightFinding(
            check="wrong_loss",
            message=f"{level:.3g} for all has a lower loss ({found[level]:.4g}) than the targets ({best:.4g})",
            cause="a loss for classes (cross-entropy) on targets that are numbers",
            advice="mean squared error, Huber or a likelihood of the targets' distribution",
            value=found[level],
            limit=best,
        )


def loss_gradient(trial: Trial) -> Findings:
    """Few samples are beyond the reach of the loss's gradient."""
    trial.requires_lab()
    if trial.outputs is None or not trial.task.can_lab or trial.outputs.dim() < 1 or trial.outputs.shape[0] < 4:
        return
    gradient = _gradient(trial, trial.outputs)
    if gradient is None or not trial.is_finite:
        return
    deaf = (gradient.flatten(1) == 0).all(1).double().mean().item() if gradient.dim() > 1 else 0.0
    hardly_begun = trial.measures.get("loss_of_perfect", 0.0) < 0.5 * trial.trace.loss
    if deaf > MOST_DEAF and hardly_begun and trial.task.is_classification:
        is_probability = bool(((trial.outputs >= 0) & (trial.outputs <= 1)).all())
        yield PreflightFinding(
            check="loss_gradient",
            # Probabilities may still leave the clamp by themselves; logits that lie beyond it never do.
            severity="info" if is_probability else "warning",
            message=f"{deaf:.0%} of the samples get no gradient from the loss, though it is far from its minimum",
            cause="outputs beyond a clamp: logits given to a loss that takes probabilities",
            advice="a loss that takes logits (cross_entropy, binary_cross_entropy_with_logits), or the missing softmax",
            value=deaf,
            limit=MOST_DEAF,
        )


def loss_coupling(trial: Trial) -> Findings:
    """A classifier's loss treats samples one by one: changing one output leaves the others' gradients alone."""
    trial.requires_lab()
    outputs = trial.outputs
    if outputs is None or trial.wanted is None or not trial.task.is_classification or outputs.shape[0] < 4:
        return
    if isinstance(last_activation(trial), nn.Softmax):
        return
    changed = outputs.clone()
    changed[0] = (
        changed[0].flip(-1) + 1.0 + torch.arange(changed[0].numel(), device=changed.device).reshape(changed[0].shape)
    )
    before, after = _gradient(trial, outputs), _gradient(trial, changed)
    if before is None or after is None:
        return
    scale = before[1:].double().norm().item()
    shift = (after - before)[1:].double().norm().item()
    if scale > 0 and shift > 1e-3 * scale:
        yield PreflightFinding(
            check="loss_coupling",
            message=f"changing one sample's outputs changes the gradients of the others by {shift / scale:.0%}",
            cause="softmax or normalisation over the batch dimension instead of the classes",
            advice="dim=-1 (classes) in softmax and log_softmax; fine where it is meant (contrastive losses)",
            value=shift / scale,
            limit=1e-3,
        )


def _ideals(trial: Trial, wanted: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "targets", wanted
    last = last_activation(trial)
    if isinstance(last, (nn.Softmax, nn.Sigmoid, nn.LogSoftmax)) or not trial.task.is_classification:
        if isinstance(last, nn.LogSoftmax):
            yield "log", (wanted + 1e-12).log()
        return
    for scale in (1.0, 2.0, 4.0, 10.0, 50.0):
        yield f"logits {scale:g}", scale * (2 * wanted - 1)


def _constant_loss(trial: Trial, wanted: Tensor) -> float | None:
    """Return the loss of the best constant among the mean and, for classes, its logits."""
    mean = wanted.mean(0, keepdim=True).expand_as(wanted).contiguous()
    candidates = [mean]
    if trial.task.is_classification:
        safe = mean.clamp(1e-6, 1 - 1e-6)
        candidates += [safe.log(), torch.logit(safe)]
    values = [v for z in candidates if (v := _value(trial, z)) is not None and math.isfinite(v)]
    return min(values, default=None)


def _is_log_loss(trial: Trial, wanted: Tensor) -> bool:
    """A log-loss grows without bound as outputs err: squared error of probabilities does not begin at ln k."""
    constant = trial.measures.get("loss_of_constant")
    return constant is not None and constant > 0.2


def _value(trial: Trial, outputs: Tensor) -> float | None:
    try:
        with torch.no_grad():
            value = trial.task.loss_of(outputs).item()
    except (RuntimeError, ValueError, IndexError):
        return None
    return value if math.isfinite(value) else None


def _gradient(trial: Trial, outputs: Tensor) -> Tensor | None:
    z = outputs.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(trial.task.loss_of(z), [z], allow_unused=True)
    except (RuntimeError, ValueError, IndexError):
        return None
    return gradient if gradient is not None and bool(torch.isfinite(gradient).all()) else None


def _centred(value: Tensor) -> Tensor:
    value = value.double().flatten(1) if value.dim() > 1 else value.double()[:, None]
    return value - value.mean(0)


def _cosine(a: Tensor, b: Tensor) -> float:
    lengths = a.norm().item() * b.norm().item()
    return (a * b).sum().item() / lengths if lengths > 0 else 0.0


def _varies(wanted: Tensor) -> bool:
    return bool((wanted != wanted[:1]).any())
