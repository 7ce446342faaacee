"""What a run leaves behind, in digests and counts: equal in two runs exactly where nothing told them apart."""

from __future__ import annotations

import gc
import hashlib
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Saved", "alive", "digest", "hooks_left", "leaves", "marks", "random_state", "state"]

_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Saved:
    """What autograd saves for backward, in order, and how much of it is never let go.

    A graph that lives on in C++ alone, which the garbage collector can't see, still holds what was packed here.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._living: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor)

    def _pack(self, tensor: Tensor) -> _Packed:
        shape = "nested" if tensor.is_nested else tuple(tensor.shape)
        self.seen.append(f"{tensor.dtype}{shape}")
        packed = _Packed(tensor)
        self._living.add(packed)
        return packed

    @property
    def num_alive(self) -> int:
        return len(self._living)


class _Packed:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def leaves(kept: Any) -> Iterator[Any]:
    """Models and optimizers out of whatever nesting a program returned."""
    if isinstance(kept, (tuple, list)):
        for each in kept:
            yield from leaves(each)
    else:
        yield kept


def state(kept: list[Any]) -> dict[str, str]:
    """Digests of weights and buffers, of gradients as they were left, and of optimizers."""
    models = [m for m in kept if isinstance(m, nn.Module)]
    optimizers = [o for o in kept if not isinstance(o, (nn.Module, Tensor))]
    tensors = [t for t in kept if isinstance(t, Tensor)]
    return {
        "weights": digest([*(list(m.state_dict().values()) for m in models), [*_own(models)], tensors]),
        "gradients": digest([p.grad for m in models for p in m.parameters()]),
        "optimizers": digest([o.state_dict() for o in optimizers]),
        "random": digest(random_state()),
    }


def _own(models: list[nn.Module]) -> Iterator[Any]:
    """What no `state_dict` tells of: buffers that are not persistent, and the mode."""
    for model in models:
        yield from model.buffers()
        yield [m.training for m in model.modules()]


def random_state() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]


def digest(value: Any) -> str:
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{value.layout}".encode())
        for part in _dense(value.detach()):
            found.update(f"{tuple(part.shape)}".encode())
            found.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        found.update(value.tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            found.update(repr(key).encode())
            _feed(found, each)
    elif isinstance(value, (list, tuple)):
        found.update(str(len(value)).encode())
        for each in value:
            _feed(found, each)
    else:
        found.update((value.hex() if isinstance(value, float) else repr(value)).encode())


def _dense(value: Tensor) -> list[Tensor]:
    if value.is_nested:
        return list(value.unbind())
    if value.is_sparse:
        value = value.coalesce()
        return [value.indices(), value.values()]
    if value.is_quantized:
        return [value.int_repr()]
    return [value.resolve_conj().resolve_neg()]


def alive() -> dict[str, int]:
    """Tensors, and the bytes they hold, that exist now; a storage counts once."""
    gc.collect()
    gc.collect()
    storages: dict[int, int] = {}
    count = 0
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # `isinstance` would ask lazy objects for their class
            count += 1
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue  # sparse and quantised ones show in the count
    return {"tensors": count, "bytes": sum(storages.values()), "threads": _threads()}


def _threads() -> int:
    """Return how many threads stay: those of a loader that was let go of take a moment to end."""
    until = time.monotonic() + 2
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(0.02)
    return threading.active_count()


def hooks_left(kept: list[Any]) -> dict[str, int]:
    """How many hooks there are, by where they hang; places without any are left out."""
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers

    found: dict[str, int] = {}

    def count(place: str, hooks: Any) -> None:
        if hooks:
            found[place] = found.get(place, 0) + len(hooks)

    for model in [m for m in kept if isinstance(m, nn.Module)]:
        for module in model.modules():
            for name in _MODULE_HOOKS:
                count(f"module{name}", getattr(module, name, None))
        for parameter in model.parameters():
            count("parameter_backward_hooks", parameter._backward_hooks)
            count("parameter_post_accumulate_grad_hooks", parameter._post_accumulate_grad_hooks)
    for optimizer in [o for o in kept if isinstance(o, Optimizer)]:
        for name in _OPTIMIZER_HOOKS:
            count(f"optimizer{name}", getattr(optimizer, name, None))
    for room in (modules, optimizers):
        for name, value in vars(room).items():
            if name.startswith("_global") and name.endswith("hooks"):
                count(name, value)
    return found


def marks(kept: list[Any]) -> str:
    """Digest of the names and classes that stand on the user's objects: nothing is written there."""
    names: list[Any] = []
    for thing in kept:
        parts = list(thing.modules()) if isinstance(thing, nn.Module) else [thing]
        names += [(type(part).__qualname__, sorted(getattr(part, "__dict__", ()))) for part in parts]
        if isinstance(thing, nn.Module):
            names += [sorted(getattr(p, "__dict__", ())) for p in thing.parameters()]
    return digest(names)
