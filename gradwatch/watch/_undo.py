"""What optimizers hold, as it was at one moment: compared bit for bit with what they hold later, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UnreadableError
from ..torchside import Aside, checksums, differ, identity, is_host, num_bytes, pieces, put_bits
from ._inventory import Inventory, Leaf

__all__ = ["Undo"]


class Undo:
    """Parameters and all of the memory of optimizers, at the moment when this is made.

    Tensors are copied as far as the limit allows, the smallest first; of the others a checksum of their bits is kept,
    which takes no memory and, on the host, three times as long:
    version counters do not move under fused optimizers, nor where somebody writes to `.data`. Plain numbers, words and
    containers are kept whole.

    Args:
        optimizers: those that hold others (a Lookahead) are followed to them.
        limit_bytes: for copies; 0: none are made.
        only_on_host: copies are made of what lies there alone, for whom checksums would do.
        name_of: the name of a parameter, for what is told.
        parts: parameters that the optimizers' groups do not show now.

    Attributes:
        is_complete: every tensor was copied.
        unreadable: why a tensor could not be read at all, in sentences.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        *,
        limit_bytes: int,
        name_of: Callable[[Tensor], str | None] = lambda tensor: None,
        only_on_host: bool = False,
        parts: Sequence[Tensor] = (),
    ) -> None:
        inventory = Inventory(optimizers, name_of, parts)
        self._boxes = inventory.boxes
        self._leaves: list[tuple[Leaf, list[Tensor]]] = []
        self._copies: dict[int, list[Tensor]] = {}
        self.unreadable: list[str] = []
        with Aside():
            for leaf in inventory.leaves:
                self._read(leaf)
            self._copy(limit_bytes, only_on_host)
            self._sums = self._summed([i for i in range(len(self._leaves)) if i not in self._copies])
        self.is_complete = len(self._copies) == len(self._leaves) and not self.unreadable

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(num_bytes(piece) for held in self._copies.values() for piece in held)

    def _read(self, leaf: Leaf) -> None:
        try:
            self._leaves.append((leaf, pieces(leaf.tensor)))
        except (UnreadableError, RuntimeError, NotImplementedError) as error:
            self.unreadable.append(f"{leaf.name}: {error}")

    def _copy(self, limit: int, only_on_host: bool) -> None:
        sizes = [sum(map(num_bytes, held)) for _, held in self._leaves]
        for i in sorted(range(len(sizes)), key=sizes.__getitem__):
            if only_on_host and not all(is_host(piece.device) for piece in self._leaves[i][1]):
                continue
            limit -= sizes[i]
            if limit < 0:
                return
            self._copies[i] = [piece.clone() for piece in self._leaves[i][1]]

    def _summed(self, places: Sequence[int]) -> dict[int, list[int]]:
        held = [(i, piece) for i in places for piece in self._leaves[i][1]]
        found: dict[int, list[int]] = {i: [] for i in places}
        for (i, _), one in zip(held, checksums([piece for _, piece in held]), strict=True):
            found[i].append(one)
        return found

    def moved(self, *, parameters_only: bool = False, spared: frozenset[str] = frozenset()) -> list[str]:
        """Return the names of what is not what it was.

        Args:
            parameters_only: leave the optimizers' own memory out.
            spared: entries of parameter groups that may change.
        """
        chosen = [i for i, (leaf, _) in enumerate(self._leaves) if leaf.is_parameter or not parameters_only]
        moved = self._moved(chosen)
        names = [leaf.name for i, (leaf, _) in enumerate(self._leaves) if i in moved]
        if not parameters_only:
            names += [name for box in self._boxes for name in box.moved(spared)]
        return list(dict.fromkeys(names))

    def accept(self, names: frozenset[str]) -> None:
        """Take entries of parameter groups as they are now: a scheduler has set them since."""
        for box in self._boxes:
            box.accept(names)

    def _moved(self, chosen: Sequence[int]) -> set[int]:
        """Return the places of the tensors that hold other bits, or lie elsewhere."""
        with Aside():
            elsewhere = {i for i in chosen if self._is_elsewhere(i)}
            copied = [i for i in chosen if i in self._copies]
            pairs = [(i, a, b) for i in copied for a, b in zip(self._copies[i], self._leaves[i][1], strict=True)]
            flags = differ([a for _, a, _ in pairs], [b for _, _, b in pairs])
            moved = {i for (i, _, _), flag in zip(pairs, flags, strict=True) if flag}
            sums = self._summed([i for i in chosen if i not in self._copies])
        return moved | elsewhere | {i for i, found in sums.items() if found != self._sums[i]}

    def _is_elsewhere(self, i: int) -> bool:
        """Return whether somebody has set the tensor's `.data`, or its size."""
        leaf, then = self._leaves[i]
        try:
            now = pieces(leaf.tensor)
        except (UnreadableError, RuntimeError, NotImplementedError):
            return True
        return len(now) != len(then) or any(not _is_same_place(a, b) for a, b in zip(now, then, strict=True))

    def put_back(self, *, spared: frozenset[str] = frozenset()) -> list[str]:
        """Put everything back, but what is spared; return the names of what is not what it was all the same."""
        with Aside():
            for box in self._boxes:
                if box.moved(spared):
                    box.put_back(spared)
            for i in self._moved(range(len(self._leaves))):
                leaf, held = self._leaves[i]
                if self._is_elsewhere(i):
                    leaf.tensor.data = leaf.data
                for piece, copy in zip(held, self._copies.get(i, ()), strict=False):
                    put_bits(piece, copy)
        return self.moved(spared=spared)


def _is_same_place(a: Tensor, b: Tensor) -> bool:
    return identity(a) == identity(b) and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
