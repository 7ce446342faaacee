"""Captured states in one safetensors file, each tensor read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._places import anchored
from ..errors import RunFormatError
from ._capture import State
from ._store import safetensors_torch

__all__ = ["SavedStates", "save_states"]

_HEADER = "gradwatch.states"


def save_states(path: str | Path, states: Sequence[State]) -> None:
    """Write states to one file: tensors by number, what they are in its header."""
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for state in states:
        ports: dict[str, Any] = {}
        for port, value in state.values.items():
            nested = isinstance(value, Mapping)
            leaves = dict(value) if nested else {"": value}
            names = {leaf: f"{state.id}/{port}/{leaf}" for leaf in leaves}
            tensors.update({names[leaf]: t.detach().to("cpu", copy=True).contiguous() for leaf, t in leaves.items()})
            ports[port] = names if nested else names[""]
        rest = {name: getattr(state, name) for name in ("id", "path", "call", "step", "time")}
        described.append({**rest, "values": ports})
    safetensors_torch().torch.save_file(tensors, path, metadata={_HEADER: json.dumps(described)})


class SavedStates(Sequence[State]):
    """The states of a file.

    Raises:
        RunFormatError: the file holds none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = anchored(path)
        with safetensors_torch().safe_open(str(self.path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
        if header is None:
            raise RunFormatError(f"{self.path} holds no captured states: it was not written by Capture.save.")
        described = json.loads(header)
        self._states = [State(**{**state, "values": _Values(self.path, state["values"])}) for state in described]

    def __getitem__(self, index: Any) -> Any:
        return self._states[index]

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return f"SavedStates({str(self.path)!r}, {len(self)} states)"


class _Values(Mapping[str, Any]):
    """What a saved state holds by port, read when asked for."""

    def __init__(self, path: Path, ports: Mapping[str, Any]) -> None:
        self._path, self._ports = path, ports

    def __getitem__(self, port: str) -> Any:
        names = self._ports[port]
        with safetensors_torch().safe_open(str(self._path), framework="pt") as file:
            if isinstance(names, str):
                return file.get_tensor(names)
            return {leaf: file.get_tensor(name) for leaf, name in names.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._ports)

    def __len__(self) -> int:
        return len(self._ports)
