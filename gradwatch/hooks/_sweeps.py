"""Sweeps: one intervention at a time over points, heads and positions, or all of them at once by their gradients."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._warn import warn
from ..errors import ConfigError
from ..torchside import map_tensors, tensors_of
from ._cache import Cache
from ._functions import Intervention
from ._patch import patch
from ._points import PAIR_PORTS, HookPoint, Point
from ._sweep import Sweep

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["SweepOptions", "attribute", "sweep"]

Metric = Callable[[Any], Any]
_ONLY = "metric"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is swept. See `HookManager.sweep`."""

    positions: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    source: Any = None
    source_positions: Any = None
    intervention: Callable[..., Any] | None = None
    batch_size: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.positions is None and self.heads is None:
            raise ConfigError("a sweep runs over `positions` or over `heads`: give one of them, or both.")
        if not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise ConfigError(f"`batch_size` is a whole number of runs from 1 up. Got {self.batch_size!r}.")
        if self.source_positions is not None and (self.positions is None or self.source is None):
            raise ConfigError("`source_positions` go with `positions` and a `source`.")

    @property
    def places(self) -> list[dict[str, int]]:
        """Return one {"heads": .., "positions": ..} for each intervention at a point, heads outermost."""
        axes = {"heads": self.heads, "positions": self.positions}
        given = {name: [int(i) for i in places] for name, places in axes.items() if places is not None}
        return [dict(zip(given, place, strict=True)) for place in itertools.product(*given.values())]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in (self.heads, self.positions) if axis is not None)

    def change(self, place: dict[str, int]) -> Any:
        if self.intervention is not None:
            return self.intervention(**place)
        return patch(self.source, **place, **self._origin(place))

    def _origin(self, place: dict[str, int]) -> dict[str, int]:
        origin = self.source_positions
        if origin is None:
            return {}
        if isinstance(origin, int):
            return {"source_positions": origin}
        if isinstance(origin, Mapping):
            return {"source_positions": int(origin[place["positions"]])}
        number = list(self.positions or ()).index(place["positions"])
        return {"source_positions": int(list(origin)[number])}


def arguments(inputs: Any, model_kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of what a user calls inputs: a tensor, a tuple or list of arguments, or a mapping."""
    named = dict(model_kwargs or {})
    if isinstance(inputs, Mapping):
        return (), {**inputs, **named}
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), named


def _measures(metric: Metric | Mapping[str, Metric]) -> dict[str, Metric]:
    found = dict(metric) if isinstance(metric, Mapping) else {_ONLY: metric}
    if not found or not all(callable(m) for m in found.values()):
        raise ConfigError("`metric` is a function of the model's output, or a dict of such.")
    return found


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().double().cpu()
    elif isinstance(value, (list, tuple)):
        value = [v.detach().double().cpu() if isinstance(v, Tensor) else v for v in value]
    return np.asarray(value, dtype=np.float64)


def _warn_of_training(model: Any) -> None:
    path = next((path for path, module in model.named_modules() if module.training and _is_fickle(module)), None)
    if path is not None:
        warn(f"{path!r} is in training mode: the runs of a sweep differ by chance. Call model.eval() before.")


def _is_fickle(module: Any) -> bool:
    """Return whether a module in training mode draws anew or updates what it remembers: dropout, batch norm."""
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return True
    shares = [module.p] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else []
    shares += [value for name, value in vars(module).items() if "dropout" in name]
    return any(isinstance(share, float) and share > 0 for share in shares)


def sweep(
    manager: HookManager,
    points: Any,
    metric: Metric | Mapping[str, Metric],
    *,
    inputs: Any,
    model_kwargs: Mapping[str, Any] | None,
    options: SweepOptions,
) -> Sweep:
    """See `HookManager.sweep`."""
    if options.source is None and options.intervention is None:
        raise ConfigError("a sweep needs a `source` to patch from (a Cache), or an `intervention`.")
    measures = _measures(metric)
    _warn_of_training(manager.model)
    args, kwargs = arguments(inputs, model_kwargs)
    with manager._inputs_at_hand(args, kwargs):
        spots = manager._resolver.resolve(points)
    places = options.places
    jobs = [(spot, place) for spot in spots for place in places]
    found: dict[str, list[Any]] = {name: [] for name in measures}
    with torch.no_grad():
        output = manager.run_with_hooks(*args, model_kwargs=kwargs)
        baselines = {name: _numbers(measure(output)) for name, measure in measures.items()}
        for number, one in enumerate(_runs(manager, args, kwargs, jobs, options), 1):
            for name, measure in measures.items():
                found[name].append(_numbers(measure(one)))
            if options.progress and number % len(places) == 0:
                _show_progress(number // len(places), len(spots), spots[number // len(places) - 1])
    values = {name: np.stack(rows).reshape(len(spots), *options.shape, *rows[0].shape) for name, rows in found.items()}
    return _sweep_of(values, baselines, spots, options)


def _sweep_of(
    values: dict[str, Any], baselines: dict[str, Any], spots: list[HookPoint], options: SweepOptions
) -> Sweep:
    first = next(iter(values))
    both = options.heads is not None and options.positions is not None
    places = options.heads if options.positions is None else options.positions
    plain = {name: float(b) if b.ndim == 0 else b for name, b in baselines.items()}
    several = set(values) != {_ONLY}
    return Sweep(
        values[first],
        tuple(str(s) for s in spots),
        tuple(int(p) for p in places or ()),
        "head" if options.positions is None else "position",
        plain[first],
        heads=tuple(int(h) for h in options.heads or ()) if both else (),
        metrics=values if several else {},
        baselines=plain if several else {},
    )


def _runs(
    manager: HookManager, args: Any, kwargs: Any, jobs: list[tuple[HookPoint, dict[str, int]]], options: SweepOptions
) -> Iterator[Any]:
    """Yield the model's output for each job; several jobs go as one batch where that was asked for."""
    if options.batch_size == 1:
        for spot, place in jobs:
            yield manager.run_with_hooks(*args, hooks=[(spot, options.change(place))], model_kwargs=kwargs)
        return
    size = next((t.shape[0] for _, t in tensors_of([args, kwargs]) if t.dim()), None)
    if size is None:
        raise ConfigError("runs are batched along the first dimension of the inputs: there is none. Use batch_size=1.")
    for begin in range(0, len(jobs), options.batch_size):
        chunk = jobs[begin : begin + options.batch_size]
        wide = [_repeated(tree, size, len(chunk)) for tree in (args, kwargs)]
        changes: dict[HookPoint, dict[int, Any]] = {}
        for number, (spot, place) in enumerate(chunk):
            changes.setdefault(spot, {})[number] = options.change(place)
        hooks = [(spot, _Rows(rows, len(chunk))) for spot, rows in changes.items()]
        output = manager.run_with_hooks(*wide[0], hooks=hooks, model_kwargs=wide[1])
        for number in range(len(chunk)):
            yield _share(output, number, size, len(chunk))


def _repeated(tree: Any, size: int, times: int) -> Any:
    def wider(tensor: Tensor, leaf: str) -> Tensor | None:
        return torch.cat([tensor] * times) if tensor.dim() and tensor.shape[0] == size else None

    return map_tensors(tree, wider)


def _share(tree: Any, number: int, size: int, times: int) -> Any:
    """Return one job's part of an output. What is one number for all jobs together is nobody's: nan."""

    def part(tensor: Tensor, leaf: str) -> Tensor | None:
        if tensor.dim() and tensor.shape[0] == size * times:
            return tensor[number * size : (number + 1) * size]
        return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() and not tensor.dim() else None

    return map_tensors(tree, part)


class _Rows(Intervention):
    """Several interventions, each in its share of the batch."""

    is_pure = True

    def __init__(self, changes: dict[int, Any], times: int) -> None:
        super().__init__(None)
        self.changes, self.times = changes, times

    def intervene(self, tensor: Tensor, point: Point) -> Tensor:
        if not tensor.dim() or tensor.shape[0] % self.times:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not split into {self.times} runs")
        parts = list(tensor.chunk(self.times))
        for number, change in self.changes.items():
            new = change(parts[number], point)
            parts[number] = parts[number] if new is None else new
        return torch.cat(parts)


def attribute(
    manager: HookManager,
    points: Any,
    metric: Metric,
    *,
    inputs: Any,
    model_kwargs: Mapping[str, Any] | None,
    options: SweepOptions,
) -> Sweep:
    """See `HookManager.attribute`."""
    _warn_of_training(manager.model)
    args, kwargs = arguments(inputs, model_kwargs)
    seen: list[float] = []

    def measured(output: Any) -> Tensor:
        value = metric(output)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise ConfigError("attribution needs a metric that is one number, a tensor that gradients go through.")
        seen.append(float(value.detach()))
        return value

    _, cache = manager.run_with_cache(*args, points=points, gradients=measured, model_kwargs=kwargs)
    source = options.source
    if source is not None and not isinstance(source, Cache):
        given, named = arguments(source, model_kwargs)
        _, source = manager.run_with_cache(*given, points=points, model_kwargs=named)
    with manager._inputs_at_hand(args, kwargs):
        spots = manager._resolver.resolve(points)
    values = np.stack([_estimate(cache, source, spot, options) for spot in spots])
    values = values.reshape(len(spots), *options.shape) + seen[0]
    return _sweep_of({_ONLY: values}, {_ONLY: np.asarray(seen[0])}, spots, options)


def _estimate(cache: Cache, source: Cache | None, spot: HookPoint, options: SweepOptions) -> np.ndarray[Any, Any]:
    """Return gradient times difference, summed over all that is not swept."""
    here, grad = cache[spot.name], cache.gradients[spot.name]
    if not (isinstance(here, Tensor) and isinstance(grad, Tensor)):
        raise ConfigError(f"{spot.name!r} is no one tensor.")
    there = torch.zeros_like(here) if source is None else source[spot.name].to(here.device, here.dtype)
    pairs = spot.port in PAIR_PORTS
    position_dim, head_dim = (2, 1) if pairs else (1, here.dim() - 2)
    found = []
    for place in options.places:
        index: list[Any] = [slice(None)] * here.dim()
        if "heads" in place:
            index[head_dim] = place["heads"]
        origin = list(index)
        if "positions" in place:
            index[position_dim] = place["positions"]
            origin[position_dim] = options._origin(place).get("source_positions", place["positions"])
        difference = there[tuple(origin)] - here[tuple(index)]
        found.append(float((difference.double() * grad[tuple(index)].double()).sum()))
    return np.asarray(found)


def _show_progress(done: int, total: int, name: str) -> None:
    width = 30
    filled = width * done // total
    end = "\n" if done == total else ""
    sys.stderr.write(f"\rsweep [{'#' * filled}{'.' * (width - filled)}] {done}/{total} {name:<40.40}{end}")
    sys.stderr.flush()
