"""A step's micro-batches, kept so that they can be run again as they were run: for an autopsy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..samples import Begun
from ..torchside import (
    Aside,
    WeakHook,
    accelerator,
    find,
    is_traced,
    map_tensors,
    set_every_random_state,
    tensors_of,
    untraced,
)
from ._batch import num_samples

__all__ = ["ForwardMemory", "Replay"]


@dataclass(frozen=True)
class Replay:
    """How to run one micro-batch's forward again, and where its backward began.

    Attributes:
        rng: the random states it began with.
        run: returns its loss, or the model's outputs.
        size: samples in it; 0 where unknown.
        grads: the gradient that backward handed to each of the outputs, by name; None where `run` returns the loss.
    """

    rng: Mapping[str, Any]
    run: Callable[[], Any]
    size: int = 0
    grads: Mapping[str, Tensor] | None = None

    def begin(self) -> Begun:
        """Run forward; return where backward begins: nowhere, where there is no loss that has a graph, and no output
        whose gradient was seen."""
        set_every_random_state(self.rng)
        output = self.run()
        if self.grads is None:
            loss = _loss(output)
            return Begun([], []) if loss is None else Begun([loss], [None])
        return self._begun(output, dict(self.grads))

    def _begun(self, output: Any, grads: Mapping[str, Tensor]) -> Begun:
        outputs = {name: t for name, t in tensors_of(output, objects=True) if t.requires_grad}
        pairs = [(t, grads[name]) for name, t in outputs.items() if name in grads and grads[name].shape == t.shape]
        # Where the model makes the loss, the gradients of its other outputs come of that.
        loss = find(output, "loss")
        pairs = [pair for pair in pairs if pair[0] is loss] or pairs
        return Begun([t for t, _ in pairs], [g for _, g in pairs])


def _loss(output: Any) -> Tensor | None:
    if not isinstance(output, Tensor):
        output = find(output, "loss")
    if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad:
        return output.reshape(())
    return None


@dataclass(eq=False)
class _Seen:
    """One forward pass: what it took, and what backward handed to its outputs."""

    args: Any
    kwargs: Any
    autocast: list[tuple[str, torch.dtype]]
    grads: dict[str, Tensor] = field(default_factory=dict)


class _GradSeen:
    """The hook on an output. A tensor holds its hooks, through C++ where no garbage collector looks: weakly, then."""

    __slots__ = ("name", "seen")
    __torch_unserializable__ = True

    def __init__(self, seen: _Seen, name: str) -> None:
        self.seen, self.name = weakref.ref(seen), name

    @untraced
    def __call__(self, grad: Tensor) -> None:
        seen = self.seen()
        if seen is None:
            return
        with Aside():
            # The tensor itself, not a view of it: whoever would change it in place sees that it is held.
            kept = grad.detach().clone() if grad.requires_grad else grad
            before = seen.grads.get(self.name)
            seen.grads[self.name] = kept if before is None else before + kept


class ForwardMemory:
    """Hands every training forward of a model over as something that can be run again, until it is closed.

    Args:
        model: whose forwards.
        remember: takes a call that runs one again, how many samples it has, and the gradients that its outputs get.
        is_wanted: whether the forward that begins is one to be handed over.
    """

    def __init__(
        self,
        model: nn.Module,
        remember: Callable[[Callable[[], Any], int, Mapping[str, Tensor]], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        while isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module  # run again, the wrapper would wait for a backward of its own
        self._remember, self._is_wanted = remember, is_wanted
        self._examining = False
        self._seen: _Seen | None = None
        self._handles = [
            WeakHook.of(self._before).hang(model.register_forward_pre_hook, with_kwargs=True),
            WeakHook.of(self._after).hang(model.register_forward_hook),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._seen = None
        is_real = module.training and torch.is_grad_enabled() and not is_traced()
        if is_real and not self._examining and self._is_wanted():
            # Without the graphs they came of, which would stay until the step; but still asking for gradients.
            kept: Any = (args, kwargs)
            # A container of the user's that can't be built anew is kept as it is.
            autocast = _autocast_now()
            with Aside():
                with suppress(Exception):
                    kept = map_tensors(kept, _apart)
                count = num_samples([*args, kwargs])
            own_args, own_kwargs = kept
            seen = self._seen = _Seen(own_args, own_kwargs, autocast)
            self._remember(lambda: self._again(module, seen), count, seen.grads)

    def _after(self, module: nn.Module, args: Any, outputs: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            return
        hooked: set[int] = set()
        with Aside():
            for name, tensor in tensors_of(outputs, objects=True):
                if tensor.requires_grad and tensor.grad_fn is not None and id(tensor) not in hooked:
                    hooked.add(id(tensor))
                    tensor.register_hook(_GradSeen(seen, name))

    def _again(self, module: nn.Module, seen: _Seen) -> Any:
        self._examining = True
        try:
            with _autocast(seen.autocast):
                return module(*seen.args, **seen.kwargs)
        finally:
            self._examining = False

    def close(self) -> None:
        """Take the hooks off. May be called twice."""
        for handle in self._handles:
            handle.remove()


def _apart(value: Tensor, leaf: str) -> Tensor:
    return value if value.is_leaf else value.detach().requires_grad_(value.requires_grad)


def _autocast_now() -> list[tuple[str, torch.dtype]]:
    """Return the kinds of devices for which autocast is on, and its dtype."""
    found = accelerator()
    kinds = ["cpu"] if found is None else ["cpu", found.type]
    return [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]


@contextmanager
def _autocast(kinds: list[tuple[str, torch.dtype]]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in kinds:
            stack.enter_context(torch.autocast(kind, dtype))
        yield
