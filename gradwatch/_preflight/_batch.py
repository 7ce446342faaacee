"""Checks that run the model again: leaks between samples, eval mode, and whether one batch can be learned."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..torchside import map_tensors
from ._report import PreflightFinding
from ._snapshot import same_randomness
from ._task import first_tensor, float_tensors
from ._trial import NotChecked, Trial

__all__ = ["leaks", "overfit", "train_and_eval"]

Findings = Iterable[PreflightFinding]

PROBES = (1e-3, 1e-2, 1e-1)
LEAST_FALL = 0.02
RISE = 2.0


def train_and_eval(trial: Trial) -> Findings:
    """The loss in eval mode is like that in train mode, save where running statistics are still unset."""
    fresh = any(
        isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.num_batches_tracked is not None
        and int(m.num_batches_tracked) <= 1
        for m in trial.model.modules()
    )
    train, evaluated = trial.trace.loss, trial.eval_loss
    trial.measures["loss_eval"] = evaluated
    if not math.isfinite(train) or fresh:
        return
    if not math.isfinite(evaluated) or (train > 0 and evaluated > 5 * train):
        yield PreflightFinding(
            check="train_eval_mismatch",
            message=f"the loss of this batch is {train:.4g} in train mode and {evaluated:.4g} in eval mode",
            cause="BatchNorm statistics of other data, or a branch that only one mode takes",
            advice="reset the running statistics; look at what depends on self.training",
            value=evaluated,
            limit=5 * train,
        )


def leaks(trial: Trial) -> Findings:
    """In eval mode the gradient of one sample's output reaches no other sample's input."""
    if trial.batch_size < 2:
        raise NotChecked("a batch of one")
    if trial.task.takes_model or trial.task.loss_fn is None:
        # Nodes of a graph, pairs of a contrastive loss: their outputs may depend on each other by right.
        raise NotChecked("the model is not called as model(inputs) with loss_fn(outputs, targets)")
    trial.model.eval()
    with torch.enable_grad():
        inputs, outputs = _with_gradients(trial)
    output = first_tensor(outputs)
    if inputs is None or output is None or not output.requires_grad or output.dim() == 0:
        return
    n = trial.batch_size
    if output.shape[0] != n or inputs.shape[0] != n:
        return
    chosen = n // 2
    (gradient,) = torch.autograd.grad(output[chosen].sum(), [inputs], allow_unused=True)
    if gradient is None or gradient.is_sparse or not bool(torch.isfinite(gradient).all()):
        return
    reached = (gradient.flatten(1) != 0).any(1)
    others = int(reached.sum()) - int(reached[chosen])
    if others:
        yield PreflightFinding(
            check="leak",
            severity="critical",
            message=f"in eval mode, the output of sample {chosen} depends on the inputs of {others} other samples",
            cause="a reshape or view that mixes dimensions, softmax or attention over the batch, batch_first left out",
            advice="follow the shapes: the batch dimension must pass through every layer untouched",
            value=others,
            limit=0,
        )


def _with_gradients(trial: Trial) -> tuple[Tensor | None, object]:
    """Return the tensor to differentiate by, and the outputs: the float input, else what the first embedding gives."""
    given = float_tensors(trial.task.inputs)
    if given:
        leaf = given[0].detach().clone().requires_grad_()
        return leaf, trial.task.forward(map_tensors(trial.task.inputs, lambda t, _: leaf if t is given[0] else None))
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: object, output: Tensor) -> None:
        if not caught and output.requires_grad:
            caught.append(output)

    handles = [m.register_forward_hook(catch) for m in trial.model.modules() if isinstance(m, nn.Embedding)]
    try:
        outputs = trial.task.forward(trial.task.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (caught[0] if caught else None), outputs


def overfit(trial: Trial) -> Findings:
    """Training on this one batch lowers its loss: with the optimizer as it is set, else with Adam at some step size."""
    steps, start = trial.overfit_steps, trial.trace.loss
    if not steps:
        raise NotChecked("overfit_steps is 0")
    if not trial.trace.can_learn or not math.isfinite(start):
        return
    trial.model.train()
    own = [twin for o in trial.optimizers if (twin := _twin(o)) is not None]
    if own and len(own) == len(trial.optimizers):
        losses = _train(trial, own, steps)
        end = losses[-1]
        trial.measures["loss_after_overfit"] = end
        if not math.isfinite(end) or end > start + (RISE - 1) * abs(start) + 1e-6:
            yield PreflightFinding(
                check="diverges",
                message=f"{steps} steps on this one batch take the loss from {start:.4g} to {end:.4g}",
                cause="a learning rate too high for the scale of inputs, targets or loss (a sum, not a mean)",
                advice="lower the learning rate by 10; normalise inputs and targets; average the loss; clip the norm",
                value=end,
                limit=RISE * abs(start),
            )
            return
        if end < start - 0.05 * abs(start):
            return
    floor = trial.measures.get("loss_of_perfect", 0.0)
    room = abs(start - floor)
    best = start
    for lr in PROBES:
        probe = [Adam([p for p in trial.parameters.values() if _is_dense(trial, p)], lr=lr)]
        losses = _train(trial, probe, steps)
        best = min([best, *(loss for loss in losses if math.isfinite(loss))])
        if best < start - LEAST_FALL * room:
            break
    trial.measures["loss_after_probe"] = best
    if room > 1e-4 and best > start - LEAST_FALL * room:
        yield PreflightFinding(
            check="cannot_overfit",
            message=f"{steps} steps of Adam on this one batch, at learning rates {PROBES[0]:g} to {PROBES[-1]:g}, "
            f"leave the loss at {best:.4g} of {start:.4g}",
            cause="gradients that don't reach the weights, outputs that can't reach the targets, a loss without slope",
            advice="see the other findings; shorten the network until it learns one batch, then lengthen it",
            value=best,
            limit=start - LEAST_FALL * room,
        )


def _is_dense(trial: Trial, parameter: nn.Parameter) -> bool:
    return not any(
        getattr(m, "sparse", False) and any(p is parameter for p in m.parameters(recurse=False))
        for m in trial.model.modules()
    )


def _train(trial: Trial, optimizers: Sequence[Optimizer], steps: int) -> list[float]:
    """Train on the batch with the same random numbers at each step, then put the parameters back."""
    parameters = list(trial.parameters.values())
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    strangers = [p for p in held if not any(p is q for q in parameters)]
    values = [p.detach().clone() for p in parameters + strangers]
    kept = [(p, p.grad) for p in strangers]
    losses: list[float] = []
    try:
        for _ in range(steps):
            with same_randomness(), torch.enable_grad():
                _, loss = trial.task.run()
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            for p in strangers:
                p.grad = None
            for optimizer in optimizers:
                optimizer.step()
            if not math.isfinite(loss.item()):
                return [*losses, loss.item()]
        with same_randomness(), torch.no_grad():
            losses.append(trial.task.run()[1].item())
    finally:
        with torch.no_grad():
            for p, value in zip(parameters + strangers, values, strict=True):
                p.copy_(value)
        for p, grad in kept:
            p.grad = grad
    return losses


def _twin(optimizer: Optimizer) -> Optimizer | None:
    """Return an optimizer of the same kind and settings over the same parameters, with memory and groups of its own."""
    try:
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [dict(group) for group in optimizer.param_groups]
    except Exception:
        return None
    for group in twin.param_groups:
        if float(group.get("lr", 1.0)) == 0:
            if not float(group.get("initial_lr", 0.0)):
                return None
            group["lr"] = group["initial_lr"]
    return twin
