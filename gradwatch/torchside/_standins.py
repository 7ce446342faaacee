"""The parameters of a model under the user's own names and shapes, with what stands in for some of them.

FSDP1 and DeepSpeed keep pieces of them in flat ones. Megatron's fused layers add gradients up in `main_grad`, and leave
`.grad` empty. Optimizers for half precision hold copies in float32, which carry the gradients in the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnreadableError
from ._flat import Flats
from ._memory import identity
from ._paths import clean_path
from ._peers import world_size
from ._pieces import StandIn
from ._zero import ZeroParts

__all__ = ["Owned", "masters", "parameters_of"]


class _Elsewhere(StandIn):
    """A whole parameter whose gradient is found in one of several places."""

    _model: weakref.ref[Tensor]

    def _grads(self) -> Iterator[tuple[Tensor, str]]:
        """Yield whose gradient is to be taken, under which name, in the order in which they are asked."""
        raise NotImplementedError

    @property
    def grad(self) -> Tensor | None:
        """The first of its gradients that is there."""
        for holder, name in self._grads():
            found = getattr(holder, name, None)
            if isinstance(found, Tensor):
                return found.detach().view(self.shape) if found.shape != self.shape else found
        return None

    @grad.setter
    def grad(self, new: Tensor | None) -> None:
        own = self.grad
        if new is not None and own is not None:
            if identity(own) != identity(new):
                with torch.no_grad():
                    own.copy_(new)
            return
        for holder, name in self._grads():
            if new is None and name == "main_grad":
                raise UnreadableError(
                    "a single parameter can't be left out of a step while its gradient lies in `main_grad`: skip the "
                    "whole step"
                )
            holder.grad = new


class MainGrad(_Elsewhere):
    """A parameter whose gradient is added up in an attribute of its own."""

    @staticmethod
    def of(p: Tensor) -> MainGrad:
        """Return what stands for such a parameter."""
        made: MainGrad = Tensor._make_subclass(MainGrad, p.detach())
        made._behind = weakref.ref(p)
        return made

    def settle(self) -> None:
        p = self._behind()
        if p is not None and identity(p) != identity(self):
            self.data = p.data

    def _grads(self) -> Iterator[tuple[Tensor, str]]:
        p = self._behind()
        if p is not None:
            yield p, "main_grad"


class Master(_Elsewhere):
    """A copy in float32 that the optimizer holds in a half-precision parameter's place.

    Its gradient is the optimizer's where that is there already, else the model's, from which it will be copied.
    """

    @staticmethod
    def of(master: Tensor, p: Tensor) -> Master:
        """Return what stands for a copy of this parameter of the model."""
        made: Master = Tensor._make_subclass(Master, master.detach())
        made._behind, made._model = weakref.ref(master), weakref.ref(p)
        return made

    def _grads(self) -> Iterator[tuple[Tensor, str]]:
        master, p = self._behind(), self._model()
        if master is not None:
            yield master, "grad"
        if p is not None:
            yield from ((p, name) for name in ("main_grad", "grad") if hasattr(p, name))


class Owned(NamedTuple):
    """A parameter of a model, or what stands in for it.

    Attributes:
        path: without the parts of wrappers.
        owner: the module that holds it.
        param: the parameter.
        why: its gradient is a piece of something that is not understood here: what, and what to do. Else "".
    """

    path: str
    owner: nn.Module
    param: nn.Parameter
    why: str = ""


def parameters_of(model: nn.Module) -> Iterator[Owned]:
    """Yield the parameters of a model once each, in the order of `named_parameters()` of the model as it was written.

    Those in pieces come as what stands in for them.
    """
    flats, zero = Flats(model), ZeroParts(model)
    seen: set[int] = set()
    # What DDP was told to leave alone: each rank's gradient is its own.
    ignored = frozenset(getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if world_size() > 1 else ())
    for module_path, module in model.named_modules():
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in flats.known]
        for name, p in (*own, *flats.inside.get(id(module), ())):
            if id(p) not in seen:
                seen.add(id(p))
                full = f"{module_path}.{name}" if module_path else name
                why = zero.why_strange(p) or _why_strange(p, is_ignored=full in ignored)
                yield Owned(
                    clean_path(full),
                    module,
                    zero.parts.get(id(p), _stand_in(flats, p)),
                    _CUT if flats.is_cut(p) else why,
                )


_CUT = (
    "it lies in a flat parameter of FSDP that this model does not hold, or that is not understood. Give gradwatch the "
    "model as FSDP returned it"
)
_STRANGE = (
    "a {} lies on several ranks in a way that is not understood, so that nothing can be said of the whole. FSDP, "
    "tensor parallelism and DTensor are"
)
_OWN = (
    "every rank holds one of its own ({}), and nothing says which ranks hold copies of it. Experts that are DTensors "
    "over a mesh of their own are seen"
)
_SIGNS = ("to_local", "local_shards", "local_tensor", "_local_tensor", "_local_shards", "full_tensor", "placements")


def _why_strange(p: Tensor, *, is_ignored: bool = False) -> str:
    """Return why a parameter, or its gradient, is a piece of something that nobody here understands; "" if it is
    none.

    Args:
        is_ignored: DDP was told not to average its gradient.
    """
    kind = type(p)
    is_known = issubclass(kind, StandIn) or kind.__module__.startswith("torch.distributed.tensor")
    # So do Megatron and DeepSpeed mark experts.
    is_marked = getattr(p, "allreduce", True) is False and world_size() > 1
    if not is_known and p.requires_grad and (is_marked or is_ignored):
        return _OWN.format("`allreduce` is False" if is_marked else "DDP ignores it")
    if is_known or not any(hasattr(kind, sign) or sign in vars(p) for sign in _SIGNS):
        return ""
    return _STRANGE.format(kind.__name__)


def _stand_in(flats: Flats, p: nn.Parameter) -> nn.Parameter:
    found = flats.parts.get(id(p), p)
    if found is p and not isinstance(p, StandIn) and isinstance(main := getattr(p, "main_grad", None), Tensor):
        return MainGrad.of(p) if main.numel() == p.numel() else p
    return found


_HALVES = (torch.float16, torch.bfloat16)


def masters(held: Sequence[Tensor], params: Sequence[Tensor]) -> list[Master]:
    """Return what stands for half-precision parameters of a model of which an optimizer holds copies in float32: one
    for each, in their order; nothing where these are no such copies.

    Args:
        held: what the optimizers hold beside parameters of the model.
        params: parameters of the model that are trained, and no optimizer holds.
    """
    pairs = list(zip(held, params, strict=False))
    fits = all(q.shape == p.shape and q.dtype is torch.float32 and p.dtype in _HALVES for q, p in pairs)
    return [Master.of(q, p) for q, p in pairs] if fits and len(held) == len(params) else []
