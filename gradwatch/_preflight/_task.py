"""A model, a batch and a loss, whatever their shapes, as one thing that can be run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter

from ..errors import ConfigError
from ..torchside import find, tensors_of

__all__ = ["Task", "float_tensors", "first_tensor"]

LossFn = Callable[..., Any]

_TARGET_NAMES = ("labels", "label", "targets", "target", "y")
_MODEL_NAMES = ("model", "module", "net", "network", "pl_module")


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained on one batch.

    Attributes:
        model: the network.
        batch: as the user's loader yields it.
        loss_fn: `loss_fn(outputs, targets)`, `loss_fn(model, batch)`, or None where the model returns its loss.
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFn | None

    def __post_init__(self) -> None:
        if any(isinstance(p, UninitializedParameter) for p in self.model.parameters()):
            raise ConfigError("The model has lazy parameters without values yet: run it once on a batch first.")
        if next(tensors_of(self.batch, objects=True), None) is None:
            raise ConfigError(f"`batch` holds no tensor. Got {type(self.batch).__name__}.")

    @cached_property
    def takes_model(self) -> bool:
        """The loss is of the form `loss_fn(model, batch)`: told by the name of its first argument."""
        if self.loss_fn is None or isinstance(self.loss_fn, nn.Module):
            return False
        try:
            names = list(inspect.signature(self.loss_fn).parameters)
        except (TypeError, ValueError):
            return False
        return bool(names) and names[0] in _MODEL_NAMES

    @cached_property
    def inputs(self) -> Any:
        """What the model is called with: the first of a pair, a dict without its targets, or the whole batch."""
        if self._is_pair:
            return self.batch[0]
        if isinstance(self.batch, Mapping) and self.loss_fn is not None:
            return {k: v for k, v in self.batch.items() if k not in _TARGET_NAMES}
        return self.batch

    @cached_property
    def targets(self) -> Any:
        """The second of a pair, a dict's targets, or (a lone tensor) the input itself; None where there are none."""
        if self._is_pair:
            return self.batch[1]
        if isinstance(self.batch, Mapping):
            return next((self.batch[name] for name in _TARGET_NAMES if name in self.batch), None)
        return self.batch if isinstance(self.batch, Tensor) and not self.takes_model else None

    @property
    def _is_pair(self) -> bool:
        return isinstance(self.batch, (tuple, list)) and len(self.batch) == 2

    def forward(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return self.model(*inputs)
        return self.model(inputs)

    def run(self, inputs: Any = None) -> tuple[Any, Tensor]:
        """Return outputs and loss of one pass, in the mode that the model is in.

        Raises:
            ConfigError: the loss is not one number.
        """
        if self.takes_model:
            return self._run_whole()
        outputs = self.forward(self.inputs if inputs is None else inputs)
        loss = _own_loss(outputs) if self.loss_fn is None else self.loss_fn(outputs, self.targets)
        return outputs, _checked(loss)

    def _run_whole(self, batch: Any = None) -> tuple[Any, Tensor]:
        own: list[Any] = []
        parts: list[Any] = []
        with ExitStack() as stack:
            for module in (self.model, *self.model.children()):
                kept = own if module is self.model else parts
                handle = module.register_forward_hook(lambda _m, _args, out, kept=kept: kept.append(out))
                stack.callback(handle.remove)
            assert self.loss_fn is not None
            loss = self.loss_fn(self.model, self.batch if batch is None else batch)
        # A module of Lightning's calls its network; the last part that gives more than a number made the outputs.
        outputs = own[:1] or [out for out in parts if (t := first_tensor(out)) is not None and t.dim()][-1:]
        return (outputs[0] if outputs else None), _checked(loss)

    def outputs_of(self, change: Callable[[Any], Any]) -> Any:
        """Return the model's outputs for changed inputs; None where the loss calls no module that gives any.

        Args:
            change: given the inputs (of a loss that takes model and batch: the batch), returns what to use instead.
        """
        if self.takes_model:
            return self._run_whole(change(self.batch))[0]
        return self.forward(change(self.inputs))

    @cached_property
    def can_lab(self) -> bool:
        """The loss can be tried on outputs of our own: `loss_fn(outputs, targets)`, with tensors as targets."""
        return self.loss_fn is not None and not self.takes_model and isinstance(self.targets, Tensor)

    def loss_of(self, outputs: Tensor) -> Tensor:
        """Return the loss of given outputs (where `can_lab`)."""
        assert self.loss_fn is not None
        return _checked(self.loss_fn(outputs, self.targets))

    def like_outputs(self, outputs: Tensor) -> Tensor | None:
        """Return the targets as floats in the outputs' shape (one-hot for classes); None where that can't be."""
        targets = self.targets
        if not isinstance(targets, Tensor):
            return None
        if targets.is_floating_point():
            return targets.to(outputs.dtype).reshape(outputs.shape) if targets.numel() == outputs.numel() else None
        is_index = outputs.dim() >= 2 and targets.numel() * outputs.shape[1] == outputs.numel()
        if is_index and outputs.shape[1] > 1 and int(targets.min()) >= 0 and int(targets.max()) < outputs.shape[1]:
            one_hot = functional.one_hot(targets.long().reshape(outputs.shape[0], *outputs.shape[2:]), outputs.shape[1])
            return one_hot.movedim(-1, 1).to(outputs.dtype)
        return targets.to(outputs.dtype).reshape(outputs.shape) if targets.numel() == outputs.numel() else None

    @cached_property
    def is_classification(self) -> bool:
        """Targets are whole numbers, or float rows of zeros with a single one, or zeros and ones."""
        targets = self.targets
        if not isinstance(targets, Tensor) or targets is self.batch:
            return False
        if not targets.is_floating_point():
            return True
        return bool(((targets == 0) | (targets == 1)).all()) and targets.numel() > 1


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, (Tensor, tuple, list)):
        return outputs
    return find(outputs, "loss")


def _checked(loss: Any) -> Tensor:
    if isinstance(loss, (tuple, list)) and loss:
        loss = loss[0]
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"the loss must be one number. Got {shape}: return a scalar tensor from `loss_fn`.")
    return loss.reshape(())


def float_tensors(tree: Any) -> list[Tensor]:
    """Return the floating-point tensors of a tree."""
    return [t for _, t in tensors_of(tree, objects=True) if t.is_floating_point()]


def first_tensor(tree: Any) -> Tensor | None:
    """Return the first floating-point tensor of a tree; of a model's output, its `logits` where it has some."""
    logits = find(tree, "logits")
    if isinstance(logits, Tensor):
        return logits
    return next(iter(float_tensors(tree)), None)
