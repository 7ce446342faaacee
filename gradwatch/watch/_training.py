"""What a training consists of, as one tree of tensors and plain values: taken apart for a snapshot, put back from one.

Everything is read where it lies and written back where it lies. Of DDP each rank has the whole, of FSDP its pieces.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..torchside import Kept, clean_path, fresh, put_back, random_state, set_random_state

__all__ = ["Training", "is_transparent"]

_SCHEDULED = frozenset(
    {
        *("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay"),
        *("momentum", "base_momentum", "max_momentum", "betas"),
    }
)
"""Entries of an optimizer's groups that schedulers write."""

# Whether its step was called since, a torch scheduler notes on the optimizer; the rest is torch's own way of working.
_NOT_STATE = frozenset({"state", "param_groups", "defaults", "_opt_called", "_params", "_numel_cache"})
# They hold an optimizer and nothing of their own that a step changes.
_TRANSPARENT = ("accelerate.", "deepspeed.", "lightning.", "lightning_fabric.", "pytorch_lightning.")


def is_transparent(optimizer: Any) -> bool:
    """Return whether it is a trainer's wrapper, with nothing of its own that a step changes."""
    return type(optimizer).__module__.startswith(_TRANSPARENT)


@dataclass
class Training:
    """What goes back together.

    Attributes:
        model: its parameters and buffers, all of them.
        optimizers: their states and groups, and what they keep besides.
        scaler: a loss scaler, or None.
        also: more by name, asked for anew each time: averaged models, anything with a state.
        schedulers: of learning rates, asked for anew each time.
        wrappers: optimizers of the user's own around the others; they may keep weights of their own.
        registered: what the user named.
    """

    model: nn.Module
    optimizers: Sequence[Any]
    scaler: Any = None
    also: Callable[[], Mapping[str, Any]] = dict
    schedulers: Callable[[], Sequence[Any]] = tuple
    wrappers: Sequence[Any] = ()
    registered: dict[str, Any] = field(default_factory=dict)

    def register(self, objects: Mapping[str, Any]) -> None:
        """Let more go back.

        Raises:
            ConfigError: something that has no state.
        """
        for name, thing in objects.items():
            has_state = callable(getattr(thing, "state_dict", None)) and callable(
                getattr(thing, "load_state_dict", None)
            )
            if not has_state and not isinstance(thing, (Tensor, MutableMapping, list)):
                raise ConfigError(
                    f"`register` takes modules, tensors, dicts and lists of them, and whatever has `state_dict` and "
                    f"`load_state_dict`. {name!r} is a {type(thing).__name__}."
                )
        self.registered.update(objects)

    def tree(self) -> dict[str, Any]:
        """Return all of it, live."""
        more = {**self.also(), **self.registered}
        schedulers = [*self.schedulers(), *(value for value in more.values() if _is_scheduler(value))]
        return {
            "model": _module_tree(self.model),
            "optimizers": self._optimizer_trees(),
            "scaler": _scaler_tree(self.scaler),
            "also": {name: _any_tree(value) for name, value in more.items() if not _is_scheduler(value)},
            "schedulers": [_state_of(s) for s in {id(s): s for s in schedulers}.values()],
            "random": _randomness(),
        }

    def weights(self) -> list[Tensor]:
        """Return the tensors that must be finite: parameters that are trained, and the optimizers' memory of them."""
        found: dict[int, Tensor] = {}
        for optimizer in self._all_optimizers():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    found[id(p)] = p
                    state = optimizer.state.get(p, {}) if isinstance(optimizer.state, Mapping) else {}
                    shaped = state.values() if isinstance(state, Mapping) else ()
                    found |= {id(t): t for t in shaped if isinstance(t, Tensor) and t.shape == p.shape}
        return list(found.values())

    def _optimizer_trees(self) -> list[dict[str, Any]]:
        found, met = [], set()
        for optimizer in self._all_optimizers():
            tree = _optimizer_tree(optimizer)
            if id(optimizer.state) in met:
                tree["state"] = None  # a wrapper shows the one inside
            met.add(id(optimizer.state))
            found.append(tree)
        return found

    def _all_optimizers(self) -> list[Any]:
        found: dict[int, Any] = {}
        for optimizer in (*self.optimizers, *self.wrappers):
            for each in _inside(optimizer):
                found.setdefault(id(each), each)
        return list(found.values())

    def misfit(self, tree: Mapping[str, Any]) -> str:
        """Return why a kept tree can't be put back; "" where it can. Nothing is changed."""
        misfit = _misfit(self.model, tree["model"])
        if misfit:
            return misfit
        optimizers = self._all_optimizers()
        if len(optimizers) != len(tree["optimizers"]):
            return "there are other optimizers"
        for optimizer, copy in zip(optimizers, tree["optimizers"], strict=True):
            if copy["sizes"] != _sizes(optimizer):
                return f"the groups of {type(optimizer).__name__} hold other parameters"
        return ""

    def put_back(self, tree: Mapping[str, Any], *, schedulers: bool, randomness: bool) -> None:
        """Make all of it what it was.

        Args:
            tree: from `kept(self.tree())`.
            schedulers: learning rates too, and what their schedulers remember; otherwise they go on.
            randomness: random states too; otherwise they go on.
        """
        _put_back_module(self.model, tree["model"])
        for optimizer, copy in zip(self._all_optimizers(), tree["optimizers"], strict=True):
            _put_back_optimizer(optimizer, copy, schedules=schedulers)
        if self.scaler is not None and tree["scaler"] is not None:
            _put_back_scaler(self.scaler, tree["scaler"])
        more = {**self.also(), **self.registered}
        for name, copy in tree["also"].items():
            if name in more:
                _put_back_any(more[name], copy)
        if schedulers:
            known = [*self.schedulers(), *(value for value in more.values() if _is_scheduler(value))]
            known = list({id(s): s for s in known}.values())
            for scheduler, copy in zip(known, tree["schedulers"], strict=False):
                scheduler.load_state_dict(fresh(copy))
        if randomness:
            _put_back_randomness(tree["random"])


class _Place(NamedTuple):
    """Where a module's tensor is found."""

    path: str
    kind: str
    owner: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self.owner[self.name]
        return found


def _module_places(module: nn.Module) -> Iterator[_Place]:
    """Yield parameters and buffers, those that no state dict holds too; shared ones once."""
    met: set[int] = set()
    taken: set[str] = set()
    for path, each in module.named_modules():
        for kind, own in (("parameters", each._parameters), ("buffers", each._buffers)):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in met and not _is_unmade(tensor):
                    met.add(id(tensor))
                    full = f"{path}.{name}" if path else name
                    clean = full if clean_path(full) in taken else clean_path(full)
                    taken.add(clean)
                    yield _Place(clean, kind, own, name)


def _module_tree(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"parameters": {}, "buffers": {}}
    for place in _module_places(module):
        found[place.kind][place.path] = place.tensor
    return found


def _put_back_module(module: nn.Module, tree: Mapping[str, Any]) -> None:
    for place in list(_module_places(module)):
        copy = tree[place.kind].get(place.path)
        if not isinstance(copy, Kept):
            continue
        if copy.fits(place.tensor):
            copy.write(place.tensor)
        elif place.kind == "buffers":  # a cache that has grown
            place.owner[place.name] = copy.tensor()


def _misfit(module: nn.Module, tree: Mapping[str, Any]) -> str:
    live, then = _module_tree(module)["parameters"], tree["parameters"]
    for path, copy in then.items():
        if path not in live:
            return f"the model has no {path!r} any more"
        if isinstance(copy, Kept) and not copy.fits(live[path]):
            return f"{path!r} has changed its shape or its kind"
    new = next((path for path in live if path not in then), None)
    return "" if new is None else f"{new!r} was not there yet"


def _is_unmade(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or (hasattr(value, "param_groups") and callable(getattr(value, "step", None)))


def _own(optimizer: Any) -> dict[str, Any]:
    try:
        return dict(vars(optimizer))
    except TypeError:
        return {}


def _inside(optimizer: Any, depth: int = 4) -> Iterator[Any]:
    """Yield an optimizer and those that it is made of; of a trainer's wrapper, what it wraps."""
    if not is_transparent(optimizer):
        yield optimizer
    if depth:
        for value in _own(optimizer).values():
            if value is not optimizer and _is_optimizer(value):
                yield from _inside(value, depth - 1)


def _sizes(optimizer: Any) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _places(optimizer: Any) -> dict[int, tuple[int, int]]:
    return {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}


def _optimizer_tree(optimizer: Any) -> dict[str, Any]:
    places = _places(optimizer)
    # Keyed by where a parameter stands: the parameter itself may be another by the time that this is put back.
    state = {places.get(id(key), _name(key)): value for key, value in optimizer.state.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    ids = set(places)
    own = {k: v for k, v in _own(optimizer).items() if k not in _NOT_STATE and _is_plain(v, ids)}
    return {"state": state, "groups": groups, "own": own, "sizes": _sizes(optimizer)}


def _name(key: Any) -> Any:
    return key if isinstance(key, (str, int)) else ("other", id(key))


def _is_plain(value: Any, parameters: set[int], depth: int = 4) -> bool:
    """Return whether a value is made of numbers, text and tensors that are no parameters."""
    if isinstance(value, Tensor):
        return id(value) not in parameters and not isinstance(value, nn.Parameter)
    if isinstance(value, Mapping):
        return (
            bool(depth)
            and not any(_is_optimizer(v) for v in value.values())
            and all(isinstance(k, (str, int)) and _is_plain(v, parameters, depth - 1) for k, v in value.items())
        )
    if isinstance(value, (list, tuple)):
        return bool(depth) and all(_is_plain(v, parameters, depth - 1) for v in value)
    return isinstance(value, (bool, int, float, str))


def _put_back_optimizer(optimizer: Any, tree: Mapping[str, Any], *, schedules: bool) -> None:
    if tree["state"] is not None:
        _put_back_state(optimizer, tree["state"])
    for group, copy in zip(optimizer.param_groups, tree["groups"], strict=False):
        for name, value in copy.items():
            if schedules or name not in _SCHEDULED:
                group[name] = put_back(group.get(name), value)
    for name, value in tree["own"].items():
        setattr(optimizer, name, put_back(getattr(optimizer, name, None), value))


def _put_back_state(optimizer: Any, tree: Mapping[Any, Any]) -> None:
    places, state = _places(optimizer), optimizer.state
    for key in list(state):
        if places.get(id(key), _name(key)) not in tree:
            del state[key]
    live = {places.get(id(key), _name(key)): key for key in state}
    params = [group["params"] for group in optimizer.param_groups]
    for place, copy in tree.items():
        key = live.get(place)
        if key is None and isinstance(place, tuple) and place[0] != "other":
            key = params[place[0]][place[1]]
        if key is None and isinstance(place, (str, int)):
            key = place
        if key is not None:
            state[key] = put_back(state.get(key), copy)


_SCALER = ("_scale", "_growth_tracker")


def _scaler_tree(scaler: Any) -> Any:
    # Its own `state_dict` reads the scale back from the device.
    if scaler is None:
        return None
    if all(hasattr(scaler, name) for name in _SCALER):
        return {name: getattr(scaler, name) for name in _SCALER}
    return {"state_dict": scaler.state_dict()}


def _put_back_scaler(scaler: Any, tree: Mapping[str, Any]) -> None:
    if "state_dict" in tree:
        scaler.load_state_dict(fresh(tree["state_dict"]))
        return
    for name, copy in tree.items():
        setattr(scaler, name, put_back(getattr(scaler, name), copy))


def _is_scheduler(value: Any) -> bool:
    return callable(getattr(value, "get_last_lr", None)) and not isinstance(value, nn.Module)


def _state_of(thing: Any) -> Any:
    return thing.state_dict() if callable(getattr(thing, "state_dict", None)) else {}


def _any_tree(thing: Any) -> Any:
    if isinstance(thing, nn.Module):
        return _module_tree(thing)
    if _is_optimizer(thing) and hasattr(thing, "state"):
        return _optimizer_tree(thing)
    if isinstance(thing, (Tensor, Mapping, list)):
        return thing
    return _state_of(thing)


def _put_back_any(thing: Any, tree: Any) -> None:
    if isinstance(thing, nn.Module):
        _put_back_module(thing, tree)
    elif _is_optimizer(thing) and hasattr(thing, "state"):
        _put_back_optimizer(thing, tree, schedules=False)
    elif isinstance(thing, (Tensor, Mapping, list)):
        put_back(thing, tree)
    else:
        thing.load_state_dict(fresh(tree))


def _randomness() -> dict[str, Any]:
    # Plain copies at once: they are small, and lie on the host.
    return {"torch": random_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def _put_back_randomness(tree: Mapping[str, Any]) -> None:
    set_random_state(fresh(tree["torch"]))
    random.setstate(tree["python"])
    np.random.set_state(tree["numpy"])
