"""The batches of a trial: taken from where they come without a trace, and changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigError
from ..torchside import map_tensors

__all__ = ["TARGET_NAMES", "copied", "floats_as", "inputs_of", "take", "targets_of", "with_inputs", "with_targets"]

TARGET_NAMES = ("labels", "label", "targets", "target", "y")


def take(batches: Any, count: int) -> list[Any]:
    """Return the first batches of a list or a loader; the generators that a loader draws on are put back.

    Raises:
        ConfigError: it is an iterator, of which they would be missing afterwards, or holds none.
    """
    if isinstance(batches, Iterator):
        raise ConfigError(
            f"what_if: `batches` is an iterator ({type(batches).__name__}): what is taken from it the training would "
            "miss. Give a list, `list(islice(loader, 40))`, or the loader itself."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping)):
        raise ConfigError(f"what_if: `batches` must be a list of batches, or a loader. Got {type(batches).__name__}.")
    if isinstance(batches, DataLoader):
        with _generators_kept(batches):
            found = list(islice(_of_loader(batches), count))
    else:
        found = list(islice(batches, count))
    if not found:
        raise ConfigError("what_if: `batches` holds no batch.")
    return found


def _of_loader(loader: Any) -> Iterator[Any]:
    """Yield batches without the loader's own iterator: a persistent one would be set back, workers would start."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        yield from DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=None if isinstance(loader.dataset, IterableDataset) else loader.sampler,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
            generator=loader.generator,
        )
        return
    for indices in loader.batch_sampler:
        items = getattr(loader.dataset, "__getitems__", None)
        held = items(indices) if callable(items) else [loader.dataset[i] for i in indices]
        yield loader.collate_fn(held)


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    held = [getattr(part, "generator", None) for part in (loader, loader.sampler, loader.batch_sampler, sampler)]
    kept = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def copied(batch: Any) -> Any:
    """Return a batch with copies of its tensors: a model may write to what it is given."""
    return map_tensors(batch, lambda tensor, leaf: tensor.clone() if tensor.is_leaf else None)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def inputs_of(batch: Any) -> Any:
    """Return the first of a pair, a mapping without its targets, or the whole batch."""
    if _is_pair(batch):
        return batch[0]
    return {k: v for k, v in batch.items() if k not in TARGET_NAMES} if isinstance(batch, Mapping) else batch


def targets_of(batch: Any) -> Any:
    """Return the second of a pair, or the targets of a mapping; None where there are none."""
    if _is_pair(batch):
        return batch[1]
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGET_NAMES if name in batch), None)
    return None


def with_targets(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return the batch with other targets."""
    if _is_pair(batch):
        return type(batch)((batch[0], change(batch[1]))) if not hasattr(batch, "_fields") else batch
    name = next(name for name in TARGET_NAMES if name in batch)
    return {**batch, name: change(batch[name])}


def with_inputs(batch: Any, change: Callable[[Tensor, str], Any]) -> Any:
    """Return the batch with every tensor of its inputs changed; `change` gets it and its way, and may return None."""
    if _is_pair(batch):
        pair = (map_tensors(batch[0], change), batch[1])
        return pair if isinstance(batch, tuple) else list(pair)
    if isinstance(batch, Mapping):
        return {k: v if k in TARGET_NAMES else map_tensors(v, change, str(k)) for k, v in batch.items()}
    return map_tensors(batch, change)


def floats_as(batch: Any, dtype: torch.dtype) -> Any:
    """Return the batch with floats of fewer bits in another dtype."""
    return map_tensors(batch, lambda t, leaf: t.to(dtype) if t.dtype in (torch.bfloat16, torch.float16) else None)
