"""Copies of what a training holds, in memory of the host: made without a wait, written back bit for bit.

What is copied is a tree: mappings, sequences and plain values, with tensors of any kind as leaves. `kept` gives the
same tree with a `Kept` for every tensor; `put_back` writes a kept tree into the live one, in place wherever that is
possible: optimizers, compiled programs and captured graphs know tensors by where they lie.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._devices import _pins, home, is_host, moved
from ._values import overlaps, writable

__all__ = ["Kept", "all_finite", "fresh", "kept", "kept_tensors", "local_piece", "put_back", "size_of"]

Key = tuple[Hashable, ...]


class Kept:
    """One tensor's copy on the host.

    Attributes:
        host: the elements that lie on this rank; None while they lie in a file.
        place: number of it in its tree, in the order of `kept`.
    """

    __slots__ = ("_like", "device", "host", "place")

    def __init__(self, host: Tensor | None, tensor: Tensor, place: int) -> None:
        self.host, self.place, self.device = host, place, tensor.device
        # How to make a new one, where the live one is gone: of a DTensor its layout.
        self._like = _layout_of(tensor)

    def fits(self, live: Any) -> bool:
        """Whether it can be written over a live tensor, in place."""
        if not isinstance(live, Tensor) or live.is_meta or self.host is None:
            return False
        piece = local_piece(live)
        mine = self.host
        return (piece.shape, piece.dtype, piece.layout) == (mine.shape, mine.dtype, mine.layout)

    def write(self, live: Tensor) -> None:
        """Write it over a live tensor that it fits."""
        assert self.host is not None
        piece = local_piece(live)
        piece.copy_(self.host, non_blocking=self.host.is_pinned() and not is_host(piece.device))

    def tensor(self) -> Tensor:
        """Return a new tensor like the one that was copied, where that one was."""
        assert self.host is not None
        made = self.host.clone() if is_host(self.device) else self.host.to(self.device)
        return made if self._like is None else self._like(made)


def local_piece(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor that lie on this rank, each once, sharing memory, outside of any graph.

    Version counters stay as they are when it is written to: a graph that is alive raises nothing because of it.
    """
    tensor = tensor.data
    local = getattr(tensor, "_local_tensor", None)
    tensor = tensor if local is None else local.data
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return writable(tensor) if plain and overlaps(tensor) else tensor


def _layout_of(tensor: Tensor) -> Callable[[Tensor], Tensor] | None:
    spec = getattr(tensor, "_spec", None)
    if getattr(tensor, "_local_tensor", None) is None or spec is None:
        return None
    kind: Any = type(tensor)
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()  # type: ignore[attr-defined]

    def made(local: Tensor) -> Tensor:
        found: Tensor = kind.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        return found

    return made


def size_of(tree: Any) -> int:
    """Return the bytes that the copies of a tree's tensors take."""
    return sum(_bytes(local_piece(t)) for t in _tensors(tree) if not t.is_meta)


def _bytes(piece: Tensor) -> int:
    if piece.layout is not torch.strided:
        piece = piece._values() if piece.layout is torch.sparse_coo else piece.values()
    return piece.numel() * piece.element_size()


def kept(tree: Any, spare: Sequence[Tensor | None] = ()) -> Any:
    """Return a tree with a copy of every tensor in it, in pinned memory where the tensor's device has that: the copy is
    then on its way when this returns, and whatever the device is given to do afterwards comes after it.

    Args:
        tree: what is live.
        spare: copies of an earlier tree that nobody needs any more: they are written over where they fit.
    """
    places = iter(range(2**62))

    def copied(tensor: Tensor) -> Any:
        place = next(places)
        if tensor.is_meta:
            return tensor
        piece = local_piece(tensor)
        used = spare[place] if place < len(spare) else None
        return Kept(_on_host(piece, used), tensor, place)

    with torch.no_grad():
        return _mapped(tree, copied)


def _on_host(piece: Tensor, used: Tensor | None) -> Tensor:
    if piece.layout is not torch.strided or piece.is_nested or piece.is_quantized:
        return piece.clone() if is_host(piece.device) else piece.cpu()
    pins = not is_host(piece.device) and _pins(piece.device.type)
    if used is None or (used.shape, used.dtype) != (piece.shape, piece.dtype) or used.is_pinned() != pins:
        used = torch.empty(piece.shape, dtype=piece.dtype, device="cpu", pin_memory=pins)
    return used.copy_(piece, non_blocking=pins)


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple, deque)):
        return _like(tree, [_mapped(value, change) for value in tree])
    return _plain_copy(tree)


def _like(sequence: Any, items: list[Any]) -> Any:
    kind: Any = type(sequence)
    if isinstance(sequence, deque):
        return deque(items, sequence.maxlen)
    if hasattr(kind, "_fields"):
        return kind(*items)
    return tuple(items) if isinstance(sequence, tuple) else items


def _plain_copy(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value  # a function, a lock: nothing that a step changes


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple, deque)):
        for value in tree:
            yield from _tensors(value)


def kept_tensors(tree: Any) -> Iterator[Kept]:
    """Yield the copies in a kept tree, in their order."""
    if isinstance(tree, Kept):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from kept_tensors(value)
    elif isinstance(tree, (list, tuple, deque)):
        for value in tree:
            yield from kept_tensors(value)


def put_back(live: Any, tree: Any) -> Any:
    """Return what was kept, written into what is live wherever that can hold it.

    Mappings and lists are changed in place, and so are tensors of the same shape; what is there and was not is gone
    afterwards.
    """
    if isinstance(tree, Kept):
        if not tree.fits(live):
            return tree.tensor()
        tree.write(live)
        return live
    if isinstance(tree, Mapping):
        return _put_into(live, tree)
    if isinstance(tree, (list, tuple, deque)):
        old = list(live) if isinstance(live, (list, tuple, deque)) else []
        new = [put_back(old[i] if i < len(old) else None, item) for i, item in enumerate(tree)]
        if isinstance(tree, list) and isinstance(live, list):
            live[:] = new
            return live
        return _like(tree, new)
    return _plain_copy(tree)


def _put_into(live: Any, tree: Mapping[Any, Any]) -> Any:
    target: Any = live if isinstance(live, MutableMapping) else {}
    for key in [key for key in target if key not in tree]:
        del target[key]
    for key, value in tree.items():
        target[key] = put_back(target.get(key), value)
    return target


def fresh(tree: Any) -> Any:
    """Return a kept tree with new tensors, for what takes its state from `load_state_dict`."""
    if isinstance(tree, Kept):
        return tree.tensor()
    if isinstance(tree, Mapping):
        return {key: fresh(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple, deque)):
        return _like(tree, [fresh(value) for value in tree])
    return _plain_copy(tree)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether every element of these is finite, as a 0-dim bool tensor where they lie; nothing is read back."""
    found = [_is_finite(local_piece(t)) for t in tensors if t.numel() and not t.is_meta]
    if not found:
        return torch.ones((), dtype=torch.bool, device="cpu")
    device = home(found)
    return torch.stack([moved(each, device) for each in found]).all()


def _is_finite(piece: Tensor) -> Tensor:
    if piece.layout is not torch.strided:
        piece = piece._values() if piece.layout is torch.sparse_coo else piece.values()
    if piece.is_complex():
        piece = torch.view_as_real(piece)
    if not piece.is_floating_point() or not piece.numel():
        return torch.ones((), dtype=torch.bool, device=piece.device)
    if piece.element_size() < 2:
        piece = piece.float()
    # The extremes tell: nan goes through, and no temporary as large as the tensor is made.
    return torch.isfinite(torch.stack(torch.aminmax(piece))).all()
