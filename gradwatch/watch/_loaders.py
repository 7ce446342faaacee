"""Which samples of a data set a batch was made of, where its loader can tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["RememberedBatches", "samples_of"]

NUM_BATCHES = 4096


class RememberedBatches(Sampler[list[int]]):
    """A batch sampler that remembers which samples its recent batches held, for the case files of incidents.

    ```python
    batches = BatchSampler(RandomSampler(data), batch_size=32, drop_last=False)
    loader = DataLoader(data, batch_sampler=RememberedBatches(batches), num_workers=4)
    ```

    Args:
        batches: gives lists of indices.
    """

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches
        self._told: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def __iter__(self) -> Iterator[list[int]]:
        self._told.clear()
        for number, indices in enumerate(self.batches):
            self._told[number] = tuple(indices)
            if len(self._told) > NUM_BATCHES:
                self._told.popitem(last=False)
            yield list(indices)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # `batch_size`, `drop_last`, `set_epoch` and the like are the inner one's.
        if name.startswith("_") or "batches" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.batches, name)

    def indices(self, batch_idx: int) -> tuple[int, ...] | None:
        """Return the samples of a batch of the epoch that goes on; None where that is not known any more."""
        return self._told.get(batch_idx)


def samples_of(loader: Any, batch_idx: int, num_samples: int, epoch: int = -1) -> tuple[tuple[int, ...], str]:
    """Return the data set's indices of the samples of a step, and how they are known; ((), "") where they are not.

    Of a loader that goes through its data in order, of one whose sampler draws the same order again (torch's
    `DistributedSampler`), and of one with `RememberedBatches`. Nothing is drawn from a sampler that would give other
    numbers afterwards.

    Args:
        loader: torch's, or anything with its `batch_sampler`.
        batch_idx: of the step's last micro-batch.
        num_samples: of all its micro-batches: indices are told only where they are as many.
        epoch: that it was.
    """
    told, how = _teller(getattr(loader, "batch_sampler", None), epoch)
    found: list[tuple[int, ...]] = []
    while told is not None and sum(map(len, found)) < num_samples and batch_idx >= 0:
        indices = told(batch_idx)
        if not indices:
            break
        found.insert(0, tuple(indices))
        batch_idx -= 1
    samples = tuple(index for indices in found for index in indices)
    return (samples, how) if samples and len(samples) == num_samples else ((), "")


def _teller(batches: Any, epoch: int) -> tuple[Any, str]:
    if isinstance(batches, RememberedBatches):
        return batches.indices, "indices in the data set, by RememberedBatches"
    if type(batches) is not BatchSampler:
        return None, ""
    sampler: Any = batches.sampler
    size = int(batches.batch_size)
    if type(sampler) is SequentialSampler:
        total = len(sampler)
        return lambda i: range(i * size, min((i + 1) * size, total)), "indices in the data set, read in order"
    if type(sampler) is DistributedSampler and sampler.epoch == epoch:
        order = list(sampler)
        return lambda i: order[i * size : (i + 1) * size], "indices in the data set, by its DistributedSampler"
    return None, ""
