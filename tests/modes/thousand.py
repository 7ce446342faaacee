"""What 1,000 ranks exchange at a step, taken through the code that packs it, rank by rank, in one process.

Every rank's numbers are packed twice: once to be added up, and once more to be given the sums. Torch's own backend
without a network tells the world's size; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradwatch.stats import Exchange, GradientPieces, Row, Shards, exponent_histograms, measure_pieces
from gradwatch.torchside import Piece, Whole
from gradwatch.watch._ranks import NUM_SAID, NUM_SLOTS, combine, merged_extras, pack_extras

RANKS = 1000
SIZES = (3000, 1000, 5, 0, 40_000)
CPU = torch.device("cpu")


class Wire:
    """Adds up what ranks reduce, and gives it to those who ask a second time.

    Attributes:
        sizes: elements of every vector of one rank: the same for all.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.is_known = False
        self._next = 0

    def begin(self) -> None:
        self._next = 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        place, self._next = self._next, self._next + 1
        if self.is_known:
            tensor.copy_(self.sums[place])
        elif place == len(self.sums):
            self.sums.append(tensor.clone())
        else:
            assert self.sums[place].shape == tensor.shape, (place, self.sums[place].shape, tensor.shape)
            merge = torch.add if op == dist.ReduceOp.SUM else torch.maximum
            self.sums[place] = merge(self.sums[place], tensor)


@contextmanager
def wire() -> Iterator[Wire]:
    made, original = Wire(), dist.all_reduce
    dist.all_reduce = made.all_reduce
    try:
        yield made
    finally:
        dist.all_reduce = original


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator) * 10.0 ** (-i) for i, n in enumerate(SIZES)]


def piece_of(whole: Tensor, rank: int) -> Tensor:
    """Return the part of a gradient that lies on a rank: of a small one some ranks have nothing."""
    each = -(-len(whole) // RANKS)
    start = min(rank * each, len(whole))
    held = Whole(whole.shape, (1,), start, each, dist.group.WORLD, RANKS)
    return Piece.of(whole[start : start + each], held)


def said_by(rank: int, grads: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], GradientPieces]:
    """Return what a rank puts into the exchange; every 300th could measure nothing, and sends blanks."""
    sums = {
        "samples": torch.tensor(8.0, dtype=torch.float64),
        "loss": torch.tensor([float(rank), 1.0], dtype=torch.float64),
        "failed": torch.zeros((), dtype=torch.float64),
        "extras": pack_extras({"seconds": float(rank)}, CPU),
        "norm_of_rank": torch.zeros(RANKS, dtype=torch.float64),
    }
    pieces = measure_pieces([piece_of(g, rank) for g in grads], histograms=True)
    if is_blank(rank):
        sums["failed"] += 1
        sums["loss"] = torch.zeros(2, dtype=torch.float64)
        rows = torch.zeros(len(grads), 515, dtype=torch.float64)
        shards = Shards([piece_of(g, rank) for g in grads])
        pieces = GradientPieces(shards, rows, rows[:, :1].clone(), Row(rows[:, 0].clone()))
    return sums, {}, pieces


def is_blank(rank: int) -> bool:
    return rank % 300 == 299


def step(grads: list[Tensor], made: Wire) -> list[tuple[Tensor, ...]]:
    """Take every rank through one exchange; return what each knows afterwards."""
    found = []
    for rank in range(RANKS):
        made.begin()
        sums, maxima, pieces = said_by(rank, grads)
        exchange = Exchange(pieces.shards)
        combine(sums, maxima, None, CPU, exchange=exchange, rows=pieces.rows, row_maxima=pieces.maxima)
        whole = pieces.whole()
        assert whole.histograms is not None
        known = (whole.norms, whole.sums, whole.maxima, whole.histograms, sums["loss"], sums["failed"], sums["extras"])
        found.append(known)
    return found


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    grads = gradients()
    with wire() as made:
        step(grads, made)
        made.is_known = True
        found = step(grads, made)
    first = found[0]
    for other in found[1:]:
        assert all(map(torch.equal, first, other))
    norms, counts, maxima, histograms, loss, failed, extras = first
    seen = [torch.cat([piece_of(g, r).local for r in range(RANKS) if not is_blank(r)]) for g in grads]
    expected = torch.stack([g.double().norm() for g in seen])
    torch.testing.assert_close(norms, expected, rtol=1e-7, atol=0)
    assert counts[:, 0].tolist() == [int((g == 0).sum()) for g in seen]
    assert maxima[:, 0].tolist() == [float(g.abs().max()) if len(g) else 0.0 for g in seen]
    assert torch.equal(histograms, torch.as_tensor(exponent_histograms(seen)))
    talking = [r for r in range(RANKS) if not is_blank(r)]
    assert float(loss[0] / loss[1]) == sum(talking) / len(talking)
    assert int(failed) == RANKS - len(talking)
    assert merged_extras(["seconds"], extras.numpy(), RANKS)["seconds"] == (RANKS - 1) / 2
    # One SUM, one MAX: the common numbers, a number of each rank, and a row for each tensor.
    common = 1 + 2 + 1 + (NUM_SLOTS + 2 + NUM_SAID) + RANKS
    assert [len(t) for t in made.sums] == [common + 515 * len(SIZES), len(SIZES)], [len(t) for t in made.sums]
    print(f"{RANKS} ranks, {len(SIZES)} tensors: {8 * len(made.sums[0])} and {8 * len(made.sums[1])} bytes each")


if __name__ == "__main__":
    main()
