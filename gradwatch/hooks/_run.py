"""One run of the model with hooks for its time only, and with what it brought back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import ConfigError
from ..torchside import tensors_of
from ._cache import Cache, Leaves
from ._gradients import private_base
from ._patterns import Resolver
from ._points import GRADIENT_OF, PAIR_PORTS, READ_AT, HookPoint, Point, RawCall
from ._silence import check_fired, check_missing

if TYPE_CHECKING:
    from ._hook import Hook
    from ._layers import LayerRun
    from ._manager import HookManager

__all__ = ["CacheOptions", "hooks_in_place", "run_with_cache", "run_with_hooks"]

LAST = -(10**9)
Key = tuple[str, int, str]
_NO_LOSS = "the loss does not depend on what was there"
_NOT_FOLLOWED = (
    "autograd did not follow what was there: gradients were off (torch.no_grad, a reentrant checkpoint), or it holds "
    "no floating numbers"
)


class _StopForward(BaseException):
    """Ends a forward pass early. No `Exception`, so that a model's own `except Exception` does not catch it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _stop(raw: RawCall, point: Point) -> None:
    if point.port == "output":
        raise _StopForward(raw.output)
    raise _StopForward(raw.args[0] if len(raw.args) == 1 and not raw.kwargs else raw)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What `run_with_cache` keeps, and how. See there."""

    gradients: bool | Callable[[Any], Tensor] = False
    device: Any = None
    dtype: torch.dtype | None = None
    clone: bool = True
    detach: bool = True
    pos_slice: Any = None
    remove_batch_dim: bool = False
    part: LayerRun | None = None

    def positions_of(self, tensor: Tensor, port: str) -> Tensor:
        """Return the positions that are wanted, of what has a dimension for them."""
        dim = 2 if port in PAIR_PORTS else 1
        if self.pos_slice is None or tensor.dim() <= dim + 1:
            return tensor
        given = self.pos_slice
        where = given if isinstance(given, (int, slice)) else torch.as_tensor(given, device=tensor.device)
        return tensor[(slice(None),) * dim + (where,)]

    def without_batch(self, leaves: Leaves, name: str) -> Leaves:
        if not self.remove_batch_dim:
            return leaves
        for tensor in leaves.values():
            if not tensor.dim() or tensor.shape[0] != 1:
                raise ConfigError(f"`remove_batch_dim` is for batches of one. Got {tuple(tensor.shape)} at {name!r}.")
        return {leaf: tensor[0] for leaf, tensor in leaves.items()}


_stop.is_reader = True  # type: ignore[attr-defined]


class Recorder:
    """Keeps the tensors it is shown.

    A tensor that is shown at several points (a module's output, the next one's input) is copied once, as long as
    nothing has changed it in between.

    Attributes:
        in_graph: what it is shown must be what the model goes on with, since gradients are asked for.
        lays_open: also where that takes a fused function apart: for what was asked for by name.
    """

    is_reader = True

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self.in_graph = bool(options.gradients)
        self.lays_open = False
        self.values: dict[str, dict[int, Leaves]] = {}
        self.edges: dict[Key, Any] = {}
        self.bases: dict[Key, tuple[Any, torch.Size]] = {}
        self.followed: set[str] = set()
        self._copies: dict[int, tuple[Any, int, Tensor]] = {}

    def __call__(self, tensor: Tensor, point: Point) -> Tensor | None:
        replaced = None
        if self.options.part is not None and not self.options.part.has_begun:
            return None
        if self.options.gradients and not tensor.requires_grad and tensor.is_floating_point():
            # A frozen model: from here on autograd follows. The clone is no leaf, so that it may be changed in place.
            tensor = replaced = tensor.detach().requires_grad_().clone()
        if self.options.gradients and tensor.requires_grad:
            key = (point.spot.name, point.call, point.leaf)
            self.followed.add(point.spot.name)
            self.edges[key] = tensor if tensor.is_leaf else get_gradient_edge(tensor)
            base = private_base(tensor, ()) if point.port == "output" and not point.leaf else None
            if base is not None:
                self.bases[key] = (get_gradient_edge(base), tensor.shape)
        kept = self.kept(self.options.positions_of(tensor, point.port))
        self.values.setdefault(point.spot.name, {}).setdefault(point.call, {})[point.leaf] = kept
        return replaced

    def kept(self, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor: by default a detached copy."""
        o = self.options
        dtype = o.dtype if tensor.is_floating_point() else None
        if not o.clone:
            return (tensor.detach() if o.detach else tensor).to(device=o.device, dtype=dtype)
        version = -1 if tensor.is_inference() else tensor._version
        found = self._copies.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == version >= 0:
            return found[2]
        source = tensor.detach() if o.detach else tensor
        if o.device is None and dtype is None:
            copied = source.clone()
        else:
            copied = source.to(o.device or source.device, dtype or source.dtype, copy=True)
        self._copies[id(tensor)] = (weakref.ref(tensor), version, copied)
        return copied

    def without_gradients(self, gradients: Mapping[str, Any]) -> dict[str, str]:
        """Return the gradients that are not there of what was kept, with the reason."""
        found: dict[str, str] = {}
        for name in self.values.keys() - gradients.keys():
            path, _, port = name.rpartition(":")
            found[f"{path}:{GRADIENT_OF.get(port, port)}"] = _NO_LOSS if name in self.followed else _NOT_FOLLOWED
        return found

    def gathered(self) -> dict[str, list[Leaves]]:
        return _in_order(self.values, self.options)


def _in_order(values: Mapping[str, dict[int, Leaves]], options: CacheOptions) -> dict[str, list[Leaves]]:
    return {name: [options.without_batch(calls[i], name) for i in sorted(calls)] for name, calls in values.items()}


@contextmanager
def hooks_in_place(manager: HookManager, *batches: tuple[Sequence[Any], dict[str, Any]]) -> Iterator[list[Any]]:
    """Hooks for the time of a run: off the model afterwards, but at work still in the run's graph."""
    asked: list[tuple[Any, Hook]] = []
    try:
        for specs, options in batches:
            asked += manager._add_all(specs, every_thread=False, **options)
        _refuse_parameters(asked)
        yield asked
    except BaseException:
        manager._registry.detach(hook for _, hook in asked)
        raise
    manager._registry.release(hook for _, hook in asked)


def _stopping(stop_at: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    return ([] if stop_at is None else [(stop_at, _stop)]), {"raw": True, "priority": LAST - 1}


def run_with_hooks(
    manager: HookManager,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    hooks: Sequence[Any],
    stop_at: Any,
    missing: str = "raise",
) -> Any:
    """Run the model with hooks that are gone afterwards, but still act in the graph of this run."""
    check_missing(missing)
    with hooks_in_place(manager, (hooks, {}), _stopping(stop_at)) as asked:
        output = _call(manager, args, kwargs, stop_at)
        check_fired(manager, asked[: len(hooks)], missing=missing, stop_at=stop_at)
    return output


def run_with_cache(
    manager: HookManager,
    part: LayerRun,
    options: CacheOptions,
    *,
    points: Any,
    stop_at: Any,
    hooks: Sequence[Any],
    missing: str = "raise",
) -> tuple[Any, Cache]:
    """Run a part of the model, or all, once and bring back what was asked for."""
    check_missing(missing)
    stop_at = part.stop_at if stop_at is None else stop_at
    hooks = [*part.hooks, *hooks]
    resolver = manager._resolver
    points = list(points) if isinstance(points, Iterator) else points
    recorder = Recorder(options)
    recorder.lays_open = recorder.in_graph and points is not None
    spots = _activations(manager, points, bool(options.gradients))
    recording = [(spots, recorder)], {"priority": LAST, "recompute": False}
    with hooks_in_place(manager, (hooks, {}), recording, _stopping(stop_at)) as asked:
        with torch.enable_grad() if options.gradients else nullcontext():
            output = _call(manager, part.args, part.kwargs, stop_at)
            gradients = _gradients(recorder, output, options) if options.gradients else {}
        kept = ("*:output" if points is None else points, asked[len(hooks)][1])
        silent = check_fired(manager, [*asked[: len(hooks)], kept], missing=missing, stop_at=stop_at)
    cache = Cache(recorder.gathered(), resolver, asked=_shown(resolver, points))
    cache.missing.update(silent)
    cache.gradients = Cache(gradients, resolver, kind="gradients")
    if options.gradients:
        cache.missing.update(recorder.without_gradients(gradients))
        cache.gradients.missing.update(cache.missing)
    return part.output(output), cache


def _call(manager: HookManager, args: Sequence[Any], kwargs: Mapping[str, Any], stop_at: Any) -> Any:
    try:
        output = manager.model(*args, **kwargs)
    except _StopForward as stop:
        return stop.value
    if stop_at is not None:
        raise ConfigError(f"the run never came to stop_at={stop_at!r}: its module was not called.")
    return output


def _activations(manager: HookManager, points: Any, with_gradients: bool) -> list[HookPoint]:
    """Return the points to record: real ones, each once; of aliases and gradients the tensor that is meant."""
    resolver = manager._resolver
    found = resolver.resolve("*:output") if points is None else resolver.resolve(points)
    if points is None:
        found = [*found, *(p for p in resolver.aliases.values() if p.available)]
    places: dict[str, HookPoint] = {}
    for point in found:
        port = READ_AT.get(point.port, point.port)
        if port != point.port and not with_gradients:
            raise ConfigError(f"{point.name!r} is a gradient: ask with gradients=True or gradients=loss_function.")
        if port not in GRADIENT_OF:
            raise ConfigError(f"a cache keeps inputs and outputs, and their gradients. Got {point.name!r}.")
        real = resolver.point(point.path, port)
        real.heads = point.heads
        places.setdefault(real.place, real)
    return list(places.values())


def _shown(resolver: Resolver, points: Any) -> list[HookPoint]:
    """Return the names that a cache shows: those asked for; none of its own where all outputs were."""
    found = [] if points is None else resolver.resolve(points)
    return [point for point in found if point.port in GRADIENT_OF]


def _refuse_parameters(asked: Sequence[tuple[Any, Hook]]) -> None:
    for _, hook in asked:
        for point in hook.points:
            if point.is_parameter:
                raise ConfigError(
                    f"{point.name!r} fires in backward, after the run: use `with hooks.temporary(...)` around both."
                )


def _gradients(recorder: Recorder, output: Any, options: CacheOptions) -> dict[str, list[Leaves]]:
    """Return d loss / d activation; parameters' `.grad` is not touched."""
    loss = options.gradients(output) if callable(options.gradients) else _loss_of(output)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"gradients need one number that depends on the activations. Got {shown}. "
            "Give a function of the model's output: gradients=lambda output: output.sum()."
        )
    keys, based = list(recorder.edges), list(recorder.bases)
    edges = [recorder.edges[k] for k in keys] + [recorder.bases[k][0] for k in based]
    grads = torch.autograd.grad(loss.reshape(()), edges, allow_unused=True) if edges else ()
    # Of a view that was changed in place later the gradient arrives at its base alone.
    at_base = dict(zip(based, grads[len(keys) :], strict=True))
    found: dict[str, dict[int, Leaves]] = {}
    for key, own in zip(keys, grads, strict=False):
        base = at_base.get(key)
        grad = base.reshape(recorder.bases[key][1]) if own is None and base is not None else own
        if grad is not None:
            part = options.positions_of(grad, key[0].rpartition(":")[2])
            kept = part.detach().to(device=options.device, dtype=options.dtype)
            found.setdefault(key[0], {}).setdefault(key[1], {})[key[2]] = kept
    recorder.edges.clear()
    recorder.bases.clear()
    return _in_order(found, options)


def _loss_of(output: Any) -> Any:
    if getattr(output, "loss", None) is not None:
        return output.loss
    tensors = [tensor for _, tensor in tensors_of(output)]
    return tensors[0] if len(tensors) == 1 else output
