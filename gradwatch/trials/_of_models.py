"""Changes of the model: its mode, its precision, how it begins, its activations, what is cut off from gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._batches import floats_as
from ._change import Change, NotApplicable
from ._stage import MODES
from ._trial import Trial

__all__ = [
    "Attached",
    "EvalMode",
    "FullPrecision",
    "HiddenReLU",
    "LastActivation",
    "LiveStatistics",
    "NewStart",
    "NoAutocast",
    "NoDropout",
    "PlainStep",
    "TrainMode",
]

_NORMS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_SQUASHES = (nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.SELU, nn.Softplus, nn.Mish)
SLOW_STATISTICS = 0.01
UNUSUAL_DROPOUT = 0.75


def _leaves(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return modules without children that hold no parameter, in their order, each with its parent and name."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and not any(True for _ in child.children())
    ]


@dataclass(frozen=True, repr=False)
class TrainMode(Change):
    """Every module in train mode, whatever the program asks for."""

    name: str = "train mode"
    kind: str = "repair"
    cause: str = "the model trains in eval mode"
    advice: str = "Call `model.train()` before the training steps, and after each evaluation."

    def apply(self, trial: Trial) -> None:
        if not _in_eval(trial):
            raise NotApplicable("it trains in train mode, or has nothing that differs")
        trial.stage.keep(training=True)


def _in_eval(trial: Trial) -> bool:
    return any(not m.training and isinstance(m, MODES) for m in trial.stage.modules)


@dataclass(frozen=True, repr=False)
class EvalMode(Change):
    """Every module in eval mode: no dropout, the running statistics of batch normalisation."""

    name: str = "eval mode"
    cause: str = "what train mode does (dropout, statistics of the batch) keeps it from learning"
    advice: str = "Look at dropout, and at batch normalisation over small or mixed batches."

    def apply(self, trial: Trial) -> None:
        if not any(m.training and isinstance(m, MODES) for m in trial.stage.modules):
            raise NotApplicable("no module differs between the modes")
        trial.stage.keep(training=False)


@dataclass(frozen=True, repr=False)
class LiveStatistics(Change):
    """Batch normalisation whose running statistics follow as is usual."""

    name: str = "batch normalisation's momentum 0.1"
    kind: str = "repair"
    cause: str = "running statistics of batch normalisation hardly follow: its momentum is far below 0.1"
    advice: str = "Set `momentum` to 0.1: torch's is the share of the new batch, other frameworks' of the old value."

    def apply(self, trial: Trial) -> None:
        found = [m for m in trial.stage.modules if isinstance(m, _NORMS) and m.track_running_stats]
        slow = [m for m in found if m.momentum is not None and m.momentum < SLOW_STATISTICS]
        if not slow:
            raise NotApplicable("no running statistics are slow")
        for module in slow:
            module.momentum = 0.1


@dataclass(frozen=True, repr=False)
class NoDropout(Change):
    """Dropout off."""

    name: str = "no dropout"
    cause: str = "dropout takes too much away"
    advice: str = "Lower the share that is dropped."

    def apply(self, trial: Trial) -> None:
        found = [m for m in trial.stage.modules if isinstance(m, _DROPOUTS) and m.p > 0]
        if not found:
            raise NotApplicable("there is no dropout")
        for module in found:
            module.p = 0.0

    def kind_in(self, trial: Trial) -> str:
        shares = [m.p for m in trial.stage.modules if isinstance(m, _DROPOUTS)]
        return "repair" if max(shares, default=0.0) >= UNUSUAL_DROPOUT else "setting"


@dataclass(frozen=True, repr=False)
class FullPrecision(Change):
    """Weights and what the optimizer remembers in float32."""

    name: str = "weights in float32"
    kind: str = "repair"
    cause: str = "weights are held in 16 bits, and small updates are rounded away"
    advice: str = "Hold the weights in float32 and use autocast, or round updates stochastically."

    def apply(self, trial: Trial) -> None:
        narrow = [p for p in trial.parameters().values() if p.dtype in (torch.bfloat16, torch.float16)]
        if not any(p.requires_grad for p in narrow):
            raise NotApplicable("weights that are trained are not in 16 bits")
        for module in trial.stage.modules:
            for held in (module._parameters, module._buffers):
                for tensor in held.values():
                    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                        tensor.data = tensor.data.float()
        for optimizer in trial.optimizers:
            for p, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
                        state[name] = value.to(p.dtype)
        trial.on_batch.append(lambda batch: floats_as(batch, torch.float32))


@dataclass(frozen=True, repr=False)
class NoAutocast(Change):
    """Autocast off."""

    name: str = "autocast off"
    kind: str = "part"
    cause: str = "operations under autocast lose what they would need"
    advice: str = "Keep the part of the model that overflows or underflows in float32: `autocast(enabled=False)` there."

    def apply(self, trial: Trial) -> None:
        seen: list[bool] = []
        with _autocast(seen, off=False):
            trial.run(trial.batches[0])
        if not any(seen):
            raise NotApplicable("autocast is not on")
        trial.around.append(lambda: _autocast([], off=True))


@contextmanager
def _autocast(seen: list[bool], *, off: bool) -> Iterator[None]:
    """Note, in this thread, every autocast that is entered; or enter them switched off."""
    own, mine = torch.autocast.__enter__, threading.get_ident()

    def enter(self: Any) -> Any:
        if threading.get_ident() == mine:
            seen.append(bool(self._enabled))
            self._enabled = self._enabled and not off
        return own(self)

    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    kinds = [kind for kind in ("cpu", "cuda") if off and torch.is_autocast_enabled(kind)]
    seen += [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")]
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        torch.autocast.__enter__ = own  # type: ignore[method-assign]
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


@dataclass(frozen=True, repr=False)
class NewStart(Change):
    """Weights drawn anew, of the size that their fan-in asks for (He et al., arXiv 1502.01852), biases 0."""

    name: str = "initialised again"
    # It leaves nothing as it was: of several cures it tells least.
    kind: str = "setting"
    cause: str = "the weights began, or have come to where nothing can be learnt from"
    advice: str = "Initialise with the fan-in in mind (`kaiming_normal_`), biases with 0, embeddings with 0.02."

    def apply(self, trial: Trial) -> None:
        with torch.no_grad():
            # Embeddings last: a head that shares their weights gets theirs.
            for module in sorted(trial.stage.modules, key=lambda m: isinstance(m, nn.Embedding)):
                _begin(module)
        for optimizer in trial.optimizers:
            optimizer.state.clear()


def _begin(module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif weight is not None and weight.dim() >= 2:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        bias = module._parameters.get("bias")
        if bias is not None:
            nn.init.zeros_(bias)
    elif callable(getattr(module, "reset_parameters", None)) and module._parameters:
        module.reset_parameters()  # type: ignore[operator]


_ACTIVATIONS = {"no": nn.Identity, "sigmoid": nn.Sigmoid, "softmax": nn.Softmax}


@dataclass(frozen=True, repr=False)
class LastActivation(Change):
    """Another activation at the end of the model: `"no"`, `"sigmoid"` or `"softmax"`."""

    other: str = "no"
    kind: str = "part"
    cause: str = "the last activation does not suit targets and loss"
    advice: str = "Choose it by the targets: none for numbers and for logits, sigmoid or softmax for probabilities."
    is_of_loss: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.other} activation at the end"

    def apply(self, trial: Trial) -> None:
        leaves = _leaves(trial.model)
        if not leaves:
            raise NotApplicable("the model has one module")
        parent, name, last = leaves[-1]
        made = _ACTIVATIONS[self.other]
        if not isinstance(last, (*_SQUASHES, *_RECTIFIERS)) or isinstance(last, made):
            raise NotApplicable("the model ends in no activation, or in this one")
        parent._modules[name] = made(-1) if made is nn.Softmax else made()


@dataclass(frozen=True, repr=False)
class HiddenReLU(Change):
    """ReLU where hidden activations saturate or explode."""

    name: str = "ReLU between the layers"
    kind: str = "part"
    cause: str = "activations between the layers saturate, explode or are missing"
    advice: str = "Use ReLU or a kin of it between the layers."

    def apply(self, trial: Trial) -> None:
        leaves = _leaves(trial.model)
        odd = [(p, n) for p, n, m in leaves[:-1] if isinstance(m, _SQUASHES) or _is_own_function(m)]
        if not odd:
            raise NotApplicable("no activation between the layers is one that saturates")
        for parent, name in odd:
            parent._modules[name] = nn.ReLU()


def _is_own_function(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.") and not module._parameters and not module._buffers


@dataclass(frozen=True, repr=False)
class Attached(Change):
    """Nothing is cut off: `detach` and `no_grad` are without effect in the forward pass."""

    name: str = "nothing detached"
    kind: str = "part"
    cause: str = "a part of the model is cut off from the gradient by `detach` or `no_grad`"
    advice: str = "Look for `detach`, `no_grad`, `.data` and `.item()` between those parameters and the loss."

    def apply(self, trial: Trial) -> None:
        if not trial.course.without_gradient:
            raise NotApplicable("every parameter that requires a gradient gets one")
        trial.around.append(_Attached)


class _Attached(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.detach:
            return args[0]
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, repr=False)
class PlainStep(Change):
    """zero_grad, backward and step, and nothing else, where the user's own step was given."""

    name: str = "a plain step"
    kind: str = "repair"
    cause: str = "what the training loop does around backward and step keeps it from learning"
    advice: str = "Look at the order of `zero_grad`, `backward` and `step`, and at what else writes to weights."

    def apply(self, trial: Trial) -> None:
        if not trial.has_users_step:
            raise NotApplicable("no `train_step` was given: steps are plain ones")
