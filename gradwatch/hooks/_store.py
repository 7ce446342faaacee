"""Captures on disk: one safetensors file a batch, and an index that is only ever appended to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._places import anchored
from ..errors import ConfigError, MissingExtraError, UnknownNameError, suggest

__all__ = ["ActivationStore"]

INDEX = "index.jsonl"


def safetensors_torch() -> Any:
    """Return the package safetensors, with its part for torch loaded."""
    try:
        import safetensors.torch
    except ImportError as missing:
        raise MissingExtraError("ActivationStore", "safetensors", "hooks") from missing
    return safetensors


class ActivationStore(Sequence[Mapping[str, Any]]):
    """Batches of named tensors in a folder, for captures larger than memory.

    A batch is written to a file of its own (`batch-000000.safetensors`), and then one line about it to `index.jsonl`:
    nothing is ever rewritten, a run that breaks off loses at most the batch it was writing, and a folder that exists
    is continued. Reading is lazy: a tensor is read from its file when it is asked for.

    Args:
        folder: made where it does not exist.

    Example:
        >>> store = ActivationStore("activations")
        >>> store.append({"blocks.4:output": tensor}, step=0)
        >>> store[0]["blocks.4:output"]
        >>> for tensor in store.iterate("blocks.4:output"): ...
    """

    def __init__(self, folder: str | Path) -> None:
        safetensors_torch()
        self.folder = anchored(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = self.folder / INDEX
        self._entries: list[dict[str, Any]] = _read_index(self._index)

    def append(self, tensors: Mapping[str, Tensor], **metadata: Any) -> int:
        """Write one batch and return its number. `metadata` are plain values (step, ids, ...)."""
        if not tensors:
            raise ConfigError("a batch holds at least one tensor.")
        number = self._next_number()
        name = f"batch-{number:06d}.safetensors"
        plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        writing = self.folder / (name + ".part")
        safetensors_torch().torch.save_file(plain, writing)
        writing.rename(self.folder / name)
        entry = {
            "file": name,
            "metadata": metadata,
            "tensors": {k: {"shape": list(t.shape), "dtype": str(t.dtype)} for k, t in plain.items()},
            "bytes": sum(t.numel() * t.element_size() for t in plain.values()),
        }
        line = json.dumps(entry)
        with self._index.open("a") as file:
            file.write(line + "\n")
        self._entries.append(entry)
        return len(self._entries) - 1

    def _next_number(self) -> int:
        taken = [int(found.group(1)) for e in self._entries if (found := re.search(r"batch-(\d+)", e["file"]))]
        return max(taken, default=-1) + 1

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in order of first appearance."""
        return list(dict.fromkeys(name for entry in self._entries for name in entry["tensors"]))

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self._entries)

    def metadata(self, batch: int) -> dict[str, Any]:
        """Return what was said about a batch."""
        return dict(self._entries[batch]["metadata"])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, batch: Any) -> Any:
        if isinstance(batch, slice):
            return [_Batch(self.folder, entry) for entry in self._entries[batch]]
        return _Batch(self.folder, self._entries[batch])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (_Batch(self.folder, entry) for entry in list(self._entries))

    def iterate(self, name: str) -> Iterator[Tensor]:
        """Yield one name's tensor of each batch that has it, reading one at a time."""
        if name not in self.names:
            raise UnknownNameError("tensor", name, self.names, where=str(self.folder))
        return (batch[name] for batch in self if name in batch)

    def load(self, name: str, *, dim: int = 0) -> Tensor:
        """Return one name's tensors of all batches, concatenated; it must fit into memory."""
        return torch.cat(list(self.iterate(name)), dim=dim)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder)!r}, {len(self)} batches, {self.num_bytes / 2**20:.1f} MiB)"


class _Batch(Mapping[str, Any]):
    """One batch; each tensor is read when asked for. The name of a nested output gives a dict from leaf to tensor."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self._file, self._entry = folder / entry["file"], entry
        self.metadata: dict[str, Any] = dict(entry["metadata"])

    def __getitem__(self, name: str) -> Any:
        known = self._entry["tensors"]
        if name in known:
            return self._read(name)
        leaves = [key for key in known if key.startswith(f"{name}[") and key.endswith("]")]
        if not leaves:
            raise KeyError(f"batch {self._file.name} has no {name!r}. {suggest(name, known)}".rstrip())
        return {key[len(name) + 1 : -1]: self._read(key) for key in leaves}

    def _read(self, name: str) -> Tensor:
        with safetensors_torch().safe_open(str(self._file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry["tensors"])

    def __len__(self) -> int:
        return len(self._entry["tensors"])

    def __contains__(self, name: object) -> bool:
        return name in self._entry["tensors"]


def _read_index(path: Path) -> list[dict[str, Any]]:
    """Return the index's entries; a last line that was cut off by a crash is dropped, and taken off the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole, newline, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + newline)
    return [json.loads(line) for line in whole.splitlines() if line]
