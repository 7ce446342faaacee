"""Where a bad value was born: the same batch once more under hooks on every module, and every trace of it removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ._paths import clean_path

__all__ = ["Autopsy", "Replay", "examine", "remember_forward", "rng_state"]


@dataclass(frozen=True)
class Replay:
    """How to run one micro-batch's forward again: the random state it began with, and a call that returns its loss
    (or anything else; without a scalar that has a graph only forward is examined)."""

    rng: dict[str, Any]
    run: Callable[[], Any]


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


def rng_state() -> dict[str, Any]:
    """Return the random state of the CPU and of the CUDA devices in use."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


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
    with _untouched(model):
        for replay in replays:
            result = _run_one(model, replay, params)
            if result.born:
                break
    return result


def _run_one(model: nn.Module, replay: Replay, params: Sequence[Tensor]) -> Autopsy:
    rows: list[dict[str, Any]] = []
    backward: list[str] = []

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
                tensor.register_hook(lambda grad: on_grad(row, grad))

    _set_rng(replay.rng)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            name = clean_path(path)

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                on_forward(name, args, kwargs, output)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        loss = _loss(replay.run())
        if loss is not None:
            wanted = [p for p in params if p.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)
    for row in rows:
        if not row["output_is_finite"] and row["input_is_finite"]:
            return Autopsy(born=row["path"], phase="forward", modules=rows)
    return Autopsy(born=backward[0] if backward else "", phase="backward" if backward else "", modules=rows)


def remember_forward(model: nn.Module, remember: Callable[[Callable[[], Any]], None]) -> RemovableHandle:
    """Hand every training forward of a model over as something that can be run again, until the handle is removed."""
    examining: list[bool] = []

    def again(module: nn.Module, args: Any, kwargs: Any) -> Any:
        examining.append(True)
        try:
            return module(*args, **kwargs)
        finally:
            examining.clear()

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled() and not examining:
            remember(lambda: again(module, args, kwargs))

    return model.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    rng = rng_state()
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        _set_rng(rng)


def _loss(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = output.get("loss")
    if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad:
        return output.reshape(())
    return None


def _floats(tree: Any) -> list[Tensor]:
    if hasattr(tree, "__dataclass_fields__") and not isinstance(tree, type):
        tree = {k: getattr(tree, k) for k in tree.__dataclass_fields__}
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(t.detach()).all()) for t in tensors)


def _absmax(tensors: Sequence[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)
