"""One watched pass: what every module gave out, and what gradient came back to it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._task import Task, first_tensor, float_tensors

__all__ = ["ModuleTrace", "Trace", "trace"]


@dataclass(eq=False)
class ModuleTrace:
    """What one module did in its first call.

    Attributes:
        path, module: which.
        output: live, with its graph.
        rms: of the output.
        spread: root mean square over units of the standard deviation over the batch; 0 where all samples look alike.
        input_mean, input_std, input_rms, input_absmax: of its first float input; nan where it has none.
        silent_share: of output units that were above 0 for no sample.
        saturated_share: of inputs beyond ±5.
        is_finite, input_is_finite: of output and input.
        is_empty: it was called with no rows.
        delta: norm of the loss's gradient w.r.t. the output; None where none came.
        takes_batch: its input is the batch itself.
    """

    path: str
    module: nn.Module
    output: Tensor
    rms: float
    spread: float
    input_mean: float
    input_std: float
    input_rms: float
    input_absmax: float
    silent_share: float
    saturated_share: float
    is_finite: bool
    input_is_finite: bool
    is_empty: bool
    takes_batch: bool
    delta: float | None = None


@dataclass(eq=False)
class Trace:
    """A forward and backward pass over a batch, at the present weights.

    Attributes:
        outputs: of the model, detached; None where it gives no float tensor.
        loss: its value.
        modules: leaf modules in the order of their first call.
        grads: parameter path -> gradient, None where the loss does not depend on it. Trainable parameters alone.
        can_learn: the loss depends on some parameter.
    """

    outputs: Tensor | None
    loss: float
    modules: list[ModuleTrace] = field(default_factory=list)
    grads: dict[str, Tensor | None] = field(default_factory=dict)
    can_learn: bool = True

    @property
    def called(self) -> set[str]:
        return {m.path for m in self.modules}

    @property
    def last(self) -> ModuleTrace | None:
        return self.modules[-1] if self.modules else None


def trace(task: Task) -> Trace:
    """Run forward and backward once, in the mode the model is in; no `.grad` is touched."""
    seen: dict[str, ModuleTrace] = {}
    batch_tensors = {id(t) for t in float_tensors(task.batch)}
    with ExitStack() as stack, torch.enable_grad():
        for path, module in task.model.named_modules():
            if not any(True for _ in module.children()) or isinstance(module, nn.MultiheadAttention):
                handle = module.register_forward_hook(partial(_see, seen, batch_tensors, path))
                stack.callback(handle.remove)
        outputs, loss = task.run()
    result = Trace(outputs=_detached(first_tensor(outputs)), loss=loss.item(), modules=list(seen.values()))
    named = [(path, p) for path, p in task.model.named_parameters() if p.requires_grad]
    result.can_learn = loss.requires_grad and bool(named)
    if not result.can_learn:
        result.grads = {path: None for path, _ in named}
        return result
    live = [m for m in result.modules if m.output.requires_grad]
    wanted = [p for _, p in named] + [m.output for m in live]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    result.grads = {path: grad for (path, _), grad in zip(named, grads, strict=False)}
    for module, grad in zip(live, grads[len(named) :], strict=True):
        module.delta = None if grad is None else torch.linalg.vector_norm(grad.double()).item()
    return result


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _see(seen: dict[str, ModuleTrace], batch: set[int], path: str, module: nn.Module, args: Any, output: Any) -> None:
    out = first_tensor(output)
    if path in seen or out is None:
        return
    given = first_tensor(args)
    with torch.no_grad():
        value = out.detach().double()
        x = None if given is None else given.detach().double()
        seen[path] = ModuleTrace(
            path=path,
            module=module,
            output=out,
            rms=value.square().mean().sqrt().item() if value.numel() else 0.0,
            spread=_spread(value),
            **_input_moments(x),
            silent_share=_silent_share(value),
            saturated_share=0.0 if x is None or not x.numel() else (x.abs() >= 5).double().mean().item(),
            is_finite=bool(torch.isfinite(value).all()),
            input_is_finite=x is None or bool(torch.isfinite(x).all()),
            is_empty=x is not None and x.numel() == 0,
            takes_batch=given is not None and id(given) in batch,
        )


def _input_moments(x: Tensor | None) -> dict[str, float]:
    names = ("input_mean", "input_std", "input_rms", "input_absmax")
    if x is None or not x.numel():
        return dict.fromkeys(names, float("nan"))
    values = (x.mean(), x.std(unbiased=False), x.square().mean().sqrt(), x.abs().max())
    return {name: value.item() for name, value in zip(names, values, strict=True)}


def _spread(value: Tensor) -> float:
    if value.dim() == 0 or value.shape[0] < 2 or not value.numel():
        return float("nan")
    return value.flatten(1).var(0, unbiased=False).mean().sqrt().item() if value.dim() > 1 else value.std().item()


def _silent_share(value: Tensor) -> float:
    """Units are channels of images and the last dimension of all else."""
    if value.dim() < 2 or not value.numel():
        return 0.0
    by_unit = value.movedim(1 if value.dim() >= 4 else -1, 0).flatten(1)
    return (~(by_unit > 0).any(1)).double().mean().item()
