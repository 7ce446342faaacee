"""What a run with a cache brings back: tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownPathError
from ._decompose import ResidualReading
from ._patterns import Resolver
from ._points import GRADIENT_OF, READ_AT, HookPoint, layer_of

__all__ = ["Cache", "Leaves"]

Leaves = dict[str, Tensor]
"""The tensors of one call at one point, by leaf."""


class Cache(ResidualReading, Mapping[str, Any]):
    """Activations by name: `PATH:PORT`, an alias, or a shared module's other name.

    - `cache["blocks.0.mlp:output"]` is a tensor, or, for a nested output, a dict from leaf to tensor.
    - A module that ran more than once has one value per call: `cache["cell:output", 1]`, `cache.calls("cell:output")`;
      without the number such a name is an error, and iteration gives `cell:output#0`, `cell:output#1`, ...
    - `cache["blocks.*.mlp:output"]` (any glob) is a smaller cache.
    - `cache["resid_post", 5]` is short for `blocks.5.hook_resid_post`, where the model has such a name.
    - Gradients, where asked for: `cache.gradients["blocks.0.mlp:output"]`, also as `cache["blocks.0.mlp:grad_output"]`.

    Keys come in the order in which the points were first reached, under the names they were asked for by: a cache of
    `"*.attn.hook_q"` gives queries with heads apart.

    Attributes:
        missing: points, and gradients, that were asked for by a pattern and are not here, with the reason.
    """

    def __init__(
        self,
        values: Mapping[str, list[Leaves]],
        resolver: Resolver,
        *,
        kind: str = "cache",
        asked: Iterable[HookPoint] = (),
    ) -> None:
        self._values = {name: calls for name, calls in values.items() if calls}
        self._resolver = resolver
        self._kind = kind
        self.missing: dict[str, str] = {}
        self._gradients = None if kind == "gradients" else Cache({}, resolver, kind="gradients")
        # place -> the names it was asked for under; other aliases of what is held there are not here.
        self._asked: dict[str, list[HookPoint]] = {}
        for point in asked:
            if point.place in self._values:
                self._asked.setdefault(point.place, []).append(point)

    @property
    def gradients(self) -> Cache:
        """The gradients with respect to what is held, where they were asked for."""
        return self if self._gradients is None else self._gradients

    @gradients.setter
    def gradients(self, gradients: Cache) -> None:
        self._gradients = gradients

    def _all_asked(self) -> list[HookPoint]:
        return [point for points in self._asked.values() for point in points]

    def _holds(self, point: HookPoint, place: str) -> bool:
        """Return whether a point is among what was asked for: by its place, its name, or as what is the same there."""
        asked = self._asked.get(place)
        if not asked or point.name == point.place or point.port in READ_AT:
            return True
        return any(p.name in (place, point.name) or (p.view, p.leaf) == (point.view, point.leaf) for p in asked)

    @property
    def names(self) -> list[str]:
        """The points, `PATH:PORT`, each once."""
        return list(self._values)

    def __iter__(self) -> Iterator[str]:
        for place, calls in self._values.items():
            for name in dict.fromkeys(p.name for p in self._asked.get(place, ())) or (place,):
                if len(calls) == 1:
                    yield name
                else:
                    yield from (f"{name}#{i}" for i in range(len(calls)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except LookupError:
            return False
        except ConfigError:  # it is here, once for each of several calls
            return True
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - a missing name is no KeyError here

    def __getitem__(self, key: Any) -> Any:
        name, call, leaf = _parts(key)
        if any(c in name for c in "*?[") and name not in self._values:
            return self.select(name)
        short = self._short(name, call)
        if short is not None:
            return self[short]
        point, calls = self._locate(name)
        if call is None and len(calls) > 1:
            raise ConfigError(f"{name!r} ran {len(calls)} times: ask for [{name!r}, 0] or for calls({name!r}).")
        if not -len(calls) <= (call or 0) < len(calls):
            raise UnknownPathError(f"{name}#{call}", list(self), model_name="the cache", kind="call")
        return _shown(calls[call or 0], point, leaf)

    def calls(self, name: str) -> list[Any]:
        """Return the values of every call, in order."""
        point, calls = self._locate(name)
        return [_shown(leaves, point, None) for leaves in calls]

    def _locate(self, name: str) -> tuple[HookPoint, list[Leaves]]:
        """Return the point that a name means, and what is held of it."""
        point = self._resolver.resolve(name)[0]
        source = self.gradients._values if point.port in READ_AT else self._values
        place = f"{point.path}:{READ_AT.get(point.port, point.port)}"
        if place not in source or not self._holds(point, place):
            kind = "gradient" if point.port in READ_AT else "point"
            missing = self.missing.get(name) or self.missing.get(point.place) or self.missing.get(_gradient_at(place))
            note = f" It is missing: {missing}." if missing else ""
            raise UnknownPathError(name, source, model_name=f"the {self._kind}", kind=kind, note=note)
        return point, source[place]

    def _short(self, name: str, layer: int | None) -> str | None:
        """Return what a short name stands for: `embed`; with a layer (negative: from the last) `resid_post`."""
        if ":" in name or "." in name or name in self._values:
            return None
        known = self._resolver.aliases
        if name in known:
            return None
        if layer is None:
            return f"hook_{name}" if f"hook_{name}" in known else None
        if layer < 0:
            layers = {number for alias in known if (number := layer_of(alias)) is not None}
            layer += max(layers, default=-1) + 1
        patterns = ("blocks.{}.hook_{}", "blocks.{}.attn.hook_{}", "blocks.{}.mlp.hook_{}")
        return next((full for p in patterns if (full := p.format(layer, name)) in known), None)

    def select(self, pattern: Any) -> Cache:
        """Return the part of the cache that a pattern means, gradients included; raises when that is nothing."""
        matching = self._matching(pattern)
        places = {p.place for p in matching}
        values = {n: calls for n, calls in self._values.items() if n in places}
        names = {p.name for p in self._all_asked()}
        known = {p.place for p in matching if p.name in names} | {p.place for p in matching if p.name == p.place}
        asked = [p for p in matching if p.name in names or p.place not in known]
        smaller = Cache(values, self._resolver, kind=self._kind, asked=asked)
        if self._kind != "gradients":
            kept = {n: calls for n, calls in self.gradients._values.items() if n in places}
            smaller.gradients = Cache(kept, self._resolver, kind="gradients")
        return smaller

    def _matching(self, pattern: Any) -> list[HookPoint]:
        """Return the points of a pattern that are here, at least one; where it names no port, input and output."""
        found: dict[tuple[str, Any], HookPoint] = {}
        for port in ("output", "input"):
            try:
                points = self._resolver.resolve(pattern, port=port)
            except LookupError:
                continue
            found.update({(p.name, p.port): p for p in points if p.place in self._values and self._holds(p, p.place)})
        if not found:
            raise UnknownPathError(pattern, list(self._values), model_name=f"the {self._kind}", kind="point")
        return list(found.values())

    def stack(self, pattern: str, *, call: int = 0) -> Tensor:
        """Return the tensors that a pattern means as one, (n, ...), in order of layers; all of one shape.

        Example:
            >>> cache.stack("blocks.*.hook_resid_post").shape  # (layers, batch, positions, width)
        """
        points = self._matching(pattern)
        layers = [layer_of(p) for p in points]
        if all(layer is not None for layer in layers):
            points = [p for _, p in sorted(zip(layers, points, strict=True), key=lambda pair: pair[0] or 0)]
        found = [_shown(self._values[p.place][call], p, None) for p in points]
        shapes = {tuple(t.shape) if isinstance(t, Tensor) else "nested" for t in found}
        if len(shapes) > 1 or "nested" in shapes:
            raise ConfigError(f"stack needs tensors of one shape. {pattern!r} gives {sorted(map(str, shapes))}.")
        return torch.stack(found)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Cache:
        """Return the cache on another device or in another (floating) dtype; a dtype may come first, as in torch."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = Cache(self._moved(device, dtype), self._resolver, kind=self._kind, asked=self._all_asked())
        moved.missing.update(self.missing)
        if self._kind != "gradients":
            moved.gradients = Cache(self.gradients._moved(device, dtype), self._resolver, kind="gradients")
        return moved

    def _moved(self, device: Any, dtype: torch.dtype | None) -> dict[str, list[Leaves]]:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return {
            name: [{leaf: move(tensor) for leaf, tensor in leaves.items()} for leaves in calls]
            for name, calls in self._values.items()
        }

    @property
    def num_bytes(self) -> int:
        """Memory held; tensors that are kept under several names count once."""
        tensors = {id(t): t for calls in self._values.values() for leaves in calls for t in leaves.values()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def __repr__(self) -> str:
        return f"{self._kind}({len(self._values)} points, {len(self)} values, {self.num_bytes / 2**20:.1f} MiB)"


def _gradient_at(place: str) -> str:
    """Return the name of the gradient of what is at a place."""
    path, _, port = place.rpartition(":")
    return f"{path}:{GRADIENT_OF.get(port, port)}"


def _parts(key: Any) -> tuple[str, int | None, str | None]:
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str):
        name, which = key
        return (name, which, None) if isinstance(which, int) else (name, None, str(which))
    if not isinstance(key, str):
        raise KeyError(key)
    name, hash_, number = key.rpartition("#")
    return (name, int(number), None) if hash_ and number.isdigit() else (key, None, None)


def _shown(leaves: Leaves, point: HookPoint, leaf: str | None) -> Any:
    """Return what a name means of one call: one tensor, or a dict of several."""
    wanted = leaf if leaf is not None else point.leaf
    if wanted == "first":
        tensor: Any = next(iter(leaves.values()))
    elif wanted is not None:
        if wanted not in leaves:
            raise UnknownPathError(f"{point.name}[{wanted}]", leaves, model_name="the cache", kind="leaf")
        tensor = leaves[wanted]
    else:
        tensor = next(iter(leaves.values())) if len(leaves) == 1 else dict(leaves)
    return tensor if point.view is None else point.view.read(tensor)
