"""What the columns of a record run over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnknownPathError

__all__ = ["MODULE", "PARAMETER", "Bools", "Floats", "Index", "select_paths"]

PARAMETER = "parameter"
MODULE = "module"

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def select_paths(paths: Sequence[str], patterns: str | Sequence[str]) -> Bools:
    """Return which paths match any of the glob patterns (`*` crosses dots). `"*"` matches every path."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if "*" in patterns:
        return np.ones(len(paths), dtype=np.bool_)
    return np.fromiter((any(fnmatchcase(p, pattern) for pattern in patterns) for p in paths), np.bool_, len(paths))


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The paths that a record's columns run over: parameters first, then modules, each in forward order where known.

    Attributes:
        paths: unique dotted names, as in `named_parameters()` and `named_modules()`.
        kinds: `"parameter"` or `"module"`, one per path.
        numel: elements of the parameter (whole tensor, when sharded); 0 for modules.
        shapes: of the parameter (whole tensor); () for modules.
        depth: place in forward order, from 0; a module and its own parameters are neighbours.
        types: class name of the module, or of the module that owns the parameter.
        in_optimizer: held by an optimizer (only those are measured for the step).
        trainable: `requires_grad`.
    """

    paths: tuple[str, ...]
    kinds: tuple[str, ...]
    numel: NDArray[np.int64]
    shapes: tuple[tuple[int, ...], ...]
    depth: NDArray[np.int64]
    types: tuple[str, ...] = ()
    in_optimizer: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    trainable: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))

    def __post_init__(self) -> None:
        n = len(self.paths)
        defaults = {
            "types": ("",) * n,
            "in_optimizer": self.is_parameter,
            "trainable": self.is_parameter,
        }
        for name, default in defaults.items():
            if len(getattr(self, name)) != n:
                object.__setattr__(self, name, default)
        for name in ("kinds", "numel", "shapes", "depth"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"Index has {n} paths, but {len(getattr(self, name))} `{name}`.")

    @classmethod
    def of_parameters(cls, paths: Sequence[str], numel: Sequence[int] | None = None) -> Index:
        """Return an index of parameters alone, in forward order: for tests, replay and logs of other programs."""
        sizes = np.asarray(numel if numel is not None else [1] * len(paths), np.int64)
        return cls(
            paths=tuple(paths),
            kinds=(PARAMETER,) * len(paths),
            numel=sizes,
            # Two dimensions, since rules leave biases (one dimension) out.
            shapes=tuple((int(n), 1) for n in sizes),
            depth=np.arange(len(paths), dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Path -> place in the columns."""
        return {p: i for i, p in enumerate(self.paths)}

    @cached_property
    def is_parameter(self) -> Bools:
        return np.fromiter((k == PARAMETER for k in self.kinds), np.bool_, len(self.kinds))

    @cached_property
    def is_module(self) -> Bools:
        return ~self.is_parameter

    @cached_property
    def num_trained(self) -> int:
        """How many parameters require a gradient and are in an optimizer."""
        return int((self.trainable & self.in_optimizer).sum())

    @cached_property
    def ndim(self) -> NDArray[np.int64]:
        """Dimensions of each parameter; 0 for modules."""
        return np.fromiter((len(s) for s in self.shapes), np.int64, len(self.shapes))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Block of each path: up to and including its first number ("h.3.attn.c" -> "h.3"), else its first name."""
        return tuple(_block(p) for p in self.paths)

    def position(self, path: str) -> int:
        """Return the place of a path in the columns.

        Raises:
            UnknownPathError: the index has no such path.
        """
        try:
            return self.positions[path]
        except KeyError:
            raise UnknownPathError(path, self.paths, model_name="the record's index") from None

    def select(self, patterns: str | Sequence[str]) -> Bools:
        """Return which paths match any of the glob patterns; `*` crosses dots."""
        key = patterns if isinstance(patterns, str) else tuple(patterns)
        if key not in self._selections:
            self._selections[key] = select_paths(self.paths, patterns)
        return self._selections[key]

    @cached_property
    def _selections(self) -> dict[str | tuple[str, ...], Bools]:
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, for files."""
        return {
            "paths": list(self.paths),
            "kinds": list(self.kinds),
            "numel": self.numel.tolist(),
            "shapes": [list(s) for s in self.shapes],
            "depth": self.depth.tolist(),
            "types": list(self.types),
            "in_optimizer": self.in_optimizer.tolist(),
            "trainable": self.trainable.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Index:
        return cls(
            paths=tuple(data["paths"]),
            kinds=tuple(data["kinds"]),
            numel=np.asarray(data["numel"], np.int64),
            shapes=tuple(tuple(s) for s in data["shapes"]),
            depth=np.asarray(data["depth"], np.int64),
            types=tuple(data["types"]),
            in_optimizer=np.asarray(data["in_optimizer"], np.bool_),
            trainable=np.asarray(data["trainable"], np.bool_),
        )


def _block(path: str) -> str:
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]
