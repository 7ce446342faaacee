"""Which samples the recent steps were made of, and their batches where these are to be saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..torchside import Mark, children, declassed, fetched, identity, tensors_of
from ._prediction import Forward

__all__ = ["NUM_STEPS", "Batches", "Fetched", "Seen"]

NUM_STEPS = 48
"""Steps whose samples are remembered: a step is judged up to a few dozen steps later."""
MAX_SAMPLES = 4096
ID_NAMES = frozenset(
    f"{what}{number}"
    for what in ("idx", "index", "sample_idx", "sample_index", "sample_id", "dataset_index", "example_id", "id", "uid")
    for number in ("", "s")
) | {"indices", "sample_indices", "dataset_indices"}
"""Entries of a batch by which a loader tells which samples it holds."""
_TELL_NOTHING = (Tensor, tuple, list)
SAVED = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@dataclass
class Seen:
    """What was seen of one step's batches, one entry for each micro-batch.

    Attributes:
        names, ids: entries of the batches that tell their samples.
        batches: the tensors of each by name, with the version that each had; empty where batches are not saved.
        num_bytes: of these.
        marks: what tells the last batch's tensors from others.
    """

    step: int = -1
    names: list[str] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    batches: list[list[tuple[str, Tensor, int]]] = field(default_factory=list)
    num_bytes: int = 0
    marks: set[Any] = field(default_factory=set)


class Batches:
    """Remembers the batches of the recent steps. Of a batch that tells no samples, and is not to be saved, nothing.

    Args:
        keeps: keep references to whole batches, to save one of them when an incident opens.
        limit_bytes: of batches that are kept.
    """

    def __init__(self, *, keeps: bool, limit_bytes: int) -> None:
        self.keeps = keeps
        self.limit_bytes = limit_bytes
        self._now: Seen | None = None
        self._recent: deque[Seen] = deque(maxlen=NUM_STEPS)

    def wants(self, batch: Any) -> bool:
        """Return whether there is anything to see in a batch: of most nothing, at next to no cost."""
        return batch is not None and type(batch) is not Forward and (self.keeps or not isinstance(batch, _TELL_NOTHING))

    def see(self, batch: Any) -> None:
        """Look at a micro-batch of the step that goes on; the same one may be shown twice."""
        named = _named(batch)
        if named is None and not self.keeps:
            return
        now = self._now = self._now or Seen()
        if named is not None and not any(named[1] is known for known in now.ids):
            now.names.append(named[0])
            now.ids.append(named[1])
        if self.keeps:
            self._keep(now, batch)

    def _keep(self, now: Seen, batch: Any) -> None:
        tensors = list(tensors_of(batch, objects=True))
        marks = {_mark(tensor) for _, tensor in tensors}
        if not tensors or (now.batches and marks <= now.marks):
            return  # it was shown already, perhaps in another container
        now.marks = marks
        held = [(leaf or "batch", declassed(tensor), tensor._version) for leaf, tensor in tensors]
        now.batches.append(held)
        now.num_bytes += sum(tensor.nbytes for _, tensor, _ in held)

    def stepped(self, step: int) -> None:
        """Say that what was seen belongs to this step."""
        if self._now is None:
            return
        self._now.step = step
        self._recent.append(self._now)
        self._now = None
        if self.keeps:
            self._make_room()

    def _make_room(self) -> None:
        room = self.limit_bytes
        for seen in reversed(self._recent):
            room -= seen.num_bytes
            if room < 0 and seen is not self._recent[-1]:
                seen.batches, seen.num_bytes = [], 0

    def of(self, step: int) -> Seen | None:
        """Return what was seen of a step; None where nothing was, or where that is long ago."""
        return next((seen for seen in reversed(self._recent) if seen.step == step), None)

    def clear(self) -> None:
        """Let go of everything."""
        self._recent.clear()
        self._now = None


def _named(batch: Any) -> tuple[str, Any] | None:
    """Return the entry of a batch that tells its samples, with its name; None where there is none."""
    if isinstance(batch, _TELL_NOTHING):
        return None
    found = next(((name, value) for name, value in children(batch) if name in ID_NAMES), None)
    return found if found is not None and _are_ids(found[1]) else None


def _mark(tensor: Tensor) -> Any:
    try:
        return identity(tensor) or id(tensor), tuple(tensor.shape), tensor._version
    except Exception:  # no memory of its own: nested, sparse, of another library's making
        return id(tensor)


def _are_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and not (value.is_floating_point() or value.is_complex()) and value.numel() > 0
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu" and value.size > 0
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, (int, str)) for v in value)


class Fetched:
    """What was seen of a step on its way to the host: copies are asynchronous where the device allows it.

    Args:
        seen: of the step.
        saves: fetch the batches, too.
    """

    def __init__(self, seen: Seen, *, saves: bool) -> None:
        self._marks: list[Mark] = []
        self.names = list(dict.fromkeys(seen.names))
        self._ids = [self._fetch(ids) if isinstance(ids, Tensor) else ids for ids in seen.ids]
        self.left_out: list[str] = []
        self._tensors = dict(self._batch_tensors(seen)) if saves else {}

    @property
    def ready(self) -> bool:
        """Whether all of it has arrived."""
        return all(mark.query() for mark in self._marks)

    @property
    def has_batch(self) -> bool:
        return bool(self._tensors)

    def wait(self) -> None:
        for mark in self._marks:
            mark.synchronize()

    def samples(self) -> tuple[int | str, ...]:
        """Return the samples that were told, at most `MAX_SAMPLES`."""
        return tuple(_plain(value) for ids in self._ids for value in ids)[:MAX_SAMPLES]

    def packed(self, about: Mapping[str, str]) -> bytes | None:
        """Return the batches as a safetensors file; None where there is nothing that could be saved.

        Args:
            about: its metadata.
        """
        if not self._tensors:
            return None
        from safetensors.torch import save

        return bytes(save({name: t.contiguous() for name, t in self._tensors.items()}, metadata=dict(about)))

    def _fetch(self, tensor: Tensor) -> Tensor:
        host, mark = fetched(tensor.detach())
        if mark is not None:
            self._marks.append(mark)
        return host

    def _batch_tensors(self, seen: Seen) -> Iterator[tuple[str, Tensor]]:
        several = len(seen.batches) > 1
        for number, held in enumerate(seen.batches):
            for leaf, tensor, version in held:
                name = f"micro{number}.{leaf}" if several else leaf
                why = _unsavable(tensor, version)
                if why:
                    self.left_out.append(f"{name} of the batch ({why})")
                else:
                    yield name, self._fetch(tensor)


def _unsavable(tensor: Tensor, version: int) -> str:
    if tensor._version != version:
        return "it was written over since"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"layout {str(tensor.layout).removeprefix('torch.')}"
    return "" if tensor.dtype in SAVED else f"dtype {str(tensor.dtype).removeprefix('torch.')}"


def _plain(value: Any) -> int | str:
    return value if isinstance(value, str) else int(value)
