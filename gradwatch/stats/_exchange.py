"""Puts one step's numbers together over ranks: one packed vector per sharded mesh dimension, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torchside import world_size
from ._shards import Shards, index_on

__all__ = ["Exchange"]


class Exchange:
    """Reduces numbers that every rank has (loss, activations), together with rows of numbers about sharded tensors.

    Where the sharded mesh dimensions span all ranks, as under FSDP2 with or without tensor parallelism, what every
    rank has travels in the rows' vectors: one all-reduce per dimension. Where there is one such dimension, and the
    other repeats the tensors (HSDP), all of it travels over all ranks, rows divided by the number of copies. Else (some
    tensor parallelism) it costs one more. Under DDP there are no rows, and one small vector.

    Every rank must call the same methods in the same order with equal shapes, whatever happened to it before.

    Args:
        shards: the pieces that rows are about; None where there are none.
    """

    def __init__(self, shards: Shards | None = None) -> None:
        self._places: Mapping[int, int] = {}
        self._num_places = 0
        self.groups: Mapping[str, tuple[Any, list[int]]] = {} if shards is None else shards.groups
        self.num_ranks = world_size()
        groups = [group for group, _ in self.groups.values()]
        self.spans = _span_all_ranks(groups, self.num_ranks)
        self.copies = 0
        if shards is not None and len(groups) == 1 and not self.spans and shards.mesh_sizes == {self.num_ranks}:
            self.copies = self.num_ranks // dist.get_world_size(groups[0])

    def whole_among(self, places: Mapping[int, int], num_places: int) -> None:
        """Say which rows are of tensors that are whole on every rank, of which one rank alone may lack some.

        Args:
            places: row -> place in a table of all that there may be.
            num_places: rows of that table, equal on all ranks.
        """
        self._places, self._num_places = places, num_places

    def sum_(self, common: Tensor, rows: Tensor | None = None) -> None:
        """Add up in place: `common` (m,) over all ranks, `rows` (n, k) over the ranks that hold other pieces.

        Rows of tensors that are whole on every rank become the mean over ranks where they travel along anyway, so that
        they are equal everywhere; else they stay.
        """
        if self._num_places and rows is not None and self.groups:
            self._sum_by_place(common, rows)
            return
        plain = None if rows is None or not self.groups else self._whole_rows(rows)
        if plain is None:
            self._reduce_(common, rows, dist.ReduceOp.SUM)
            return
        index, packed = plain
        flat = torch.cat([common, packed.reshape(-1) / self.num_ranks])
        self._reduce_(flat, rows, dist.ReduceOp.SUM)
        common.copy_(flat[: len(common)])
        assert rows is not None
        rows.index_copy_(0, index, flat[len(common) :].view_as(packed))

    def _sum_by_place(self, common: Tensor, rows: Tensor) -> None:
        """Let rows of whole tensors travel in a table of one length, each with a 1 beside it where it is there."""
        split = {p for _, positions in self.groups.values() for p in positions}
        places = {row: place for row, place in self._places.items() if row not in split}
        index = index_on(list(places), rows.device)
        where = index_on(list(places.values()), rows.device)
        mine = rows.index_select(0, index)
        table = rows.new_zeros(self._num_places, rows.shape[1] + 1)
        table.index_copy_(0, where, torch.cat([mine, torch.ones_like(mine[:, :1])], dim=1))
        flat = torch.cat([common, table.reshape(-1)])
        self._reduce_(flat, rows, dist.ReduceOp.SUM)
        common.copy_(flat[: len(common)])
        summed = flat[len(common) :].view_as(table).index_select(0, where)
        rows.index_copy_(0, index, summed[:, :-1] / summed[:, -1:])

    def max_(self, common: Tensor, rows: Tensor | None = None) -> None:
        """Take maxima in place, as `sum_` takes sums. Rows of whole tensors stay as they are."""
        self._reduce_(common, rows, dist.ReduceOp.MAX)

    def _whole_rows(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        split = {p for _, positions in self.groups.values() for p in positions}
        whole = [p for p in range(len(rows)) if p not in split]
        if not whole:
            return None
        index = index_on(whole, rows.device)
        return index, rows.index_select(0, index)

    def _reduce_(self, common: Tensor, rows: Tensor | None, op: Any) -> None:
        if self.num_ranks == 1:
            return
        for group, positions in self.groups.values():
            if rows is None:
                continue
            index = index_on(positions, rows.device)
            packed = rows.index_select(0, index)
            if self.copies:
                group = None
                packed = packed / self.copies if op == dist.ReduceOp.SUM else packed
            elif not self.spans:
                dist.all_reduce(packed, op=op, group=group)
                rows.index_copy_(0, index, packed)
                continue
            flat = torch.cat([common, packed.reshape(-1)])
            dist.all_reduce(flat, op=op, group=group)
            common.copy_(flat[: len(common)])
            rows.index_copy_(0, index, flat[len(common) :].view_as(packed))
        if (not (self.spans or self.copies) or rows is None) and len(common):
            dist.all_reduce(common, op=op)


def _span_all_ranks(groups: list[Any], num_ranks: int) -> bool:
    """Whether sums over these groups in turn are sums over all ranks: the groups are the axes of one full grid."""
    product = 1
    met: set[int] = set()
    me = dist.get_rank() if num_ranks > 1 else 0
    for group in groups:
        ranks = set(dist.get_process_group_ranks(group))
        if met & ranks - {me}:
            return False
        met |= ranks
        product *= len(ranks)
    return bool(groups) and product == num_ranks
