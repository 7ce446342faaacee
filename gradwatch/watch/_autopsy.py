"""Where a bad value was born: the same batch once more under hooks on every module, and every trace of it removed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..torchside import clean_path, tensors_of, untouched, untraced
from ._replays import Replay

__all__ = ["Autopsy", "examine"]


@dataclass
class Autopsy:
    """What the second run showed.

    Attributes:
        born: path of the first module in forward order whose output is bad while its input is not; else the first one
            in backward order whose grad_output is bad; "" where the second run showed nothing bad.
        phase: "forward", "backward" or "".
        modules: one row per call, in forward order: path, share of finite inputs and outputs, absmax of the output,
            absmax of the grad_output.
    """

    born: str = ""
    phase: str = ""
    modules: list[dict[str, Any]] = field(default_factory=list)


def examine(model: nn.Module, replays: Sequence[Replay], params: Sequence[Tensor]) -> Autopsy:
    """Run the micro-batches of a step again, until one shows where it went bad.

    Parameters' gradients are not touched (autograd gives them to nobody), the random state and all buffers are as
    before afterwards, bit for bit. Reads the device: this is for a step that has failed.

    Args:
        model: whose modules are looked at.
        replays: of the step's micro-batches.
        params: what to differentiate by.
    """
    result = Autopsy()
    # The user's hooks on saved tensors (a count, an offload) are not for a second run.
    with untouched(model), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        for replay in replays:
            result = _run_one(model, replay, params)
            if result.born:
                break
    return result


def _run_one(model: nn.Module, replay: Replay, params: Sequence[Tensor]) -> Autopsy:
    rows: list[dict[str, Any]] = []
    backward: list[str] = []

    @untraced
    def on_grad(row: dict[str, Any], grad: Tensor) -> None:
        row["grad_output_absmax"] = _absmax([grad])
        if not _finite([grad]):
            backward.append(row["path"])

    def on_forward(path: str, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = _floats([args, kwargs]), _floats(output)
        row = {
            "path": path,
            "input_is_finite": _finite(inputs),
            "output_is_finite": _finite(outputs),
            "output_absmax": _absmax(outputs),
        }
        rows.append(row)
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(on_grad, row))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            name = clean_path(path)

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                on_forward(name, args, kwargs, output)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        begun = replay.begin()
        wanted = [p for p in params if p.requires_grad]
        if begun.roots and wanted:
            torch.autograd.grad(begun.roots, wanted, begun.grads, allow_unused=True)
    for row in rows:
        if not row["output_is_finite"] and row["input_is_finite"]:
            return Autopsy(born=row["path"], phase="forward", modules=rows)
    return Autopsy(born=backward[0] if backward else "", phase="backward" if backward else "", modules=rows)


def _floats(tree: Any) -> list[Tensor]:
    return [t for _, t in tensors_of(tree, objects=True) if t.is_floating_point()]


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(t.detach()).all()) for t in tensors)


def _absmax(tensors: Sequence[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)
