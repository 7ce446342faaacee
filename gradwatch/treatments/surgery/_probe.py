"""Per-task gradients with respect to what the tasks share, without touching any `.grad`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, UnknownPathError
from ._graph import has_reentrant_checkpoint, last_used, reached_parameters, shared_features

__all__ = ["Prober", "Probes"]

Grads = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Probes:
    """Gradients of k tasks.

    Attributes:
        grads: with respect to what is shared, one tuple a task.
        all_grads: with respect to every parameter, where asked for; else ().
    """

    grads: Sequence[Grads]
    all_grads: Sequence[Grads] = ()

    def combine(self, weights: Sequence[float], *, plain_heads: bool = False) -> list[Tensor | None]:
        """Return the weighted sum over the tasks for every parameter; None where no task has a gradient.

        Args:
            weights: one a task.
            plain_heads: leave the weight out where only one task has a gradient.
        """
        columns = list(zip(*self.all_grads, strict=True))
        result: list[Tensor | None] = [None] * len(columns)
        dense = [
            i
            for i, column in enumerate(columns)
            if all(g is not None and g.layout == torch.strided for g in column) and column
        ]
        # Not in place on the first: autograd may hand out one tensor as the gradient of two parameters.
        total = list(torch._foreach_mul([columns[i][0] for i in dense], weights[0])) if dense else []
        for task, weight in enumerate(weights[1:], start=1):
            if dense:
                torch._foreach_add_(total, [columns[i][task] for i in dense], alpha=weight)
        for i, value in zip(dense, total, strict=True):
            result[i] = value
        for i in set(range(len(columns))) - set(dense):
            present = [(g, w) for g, w in zip(columns[i], weights, strict=True) if g is not None]
            terms = [g if plain_heads and len(present) == 1 else g * w for g, w in present]
            result[i] = sum(terms[1:], start=terms[0]) if terms else None
        return result


class Prober:
    """Finds what a set of tasks shares, once for each set of names, and takes their gradients with respect to it.

    Args:
        parameters: by path; the model's.
        shared: "auto", a glob over paths, or several.
        gramian: "params", "last" or "features".
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, shared: str | Sequence[str], gramian: str) -> None:
        self._parameters = parameters
        self._gramian = gramian
        self._patterns = None if shared == "auto" else [shared] if isinstance(shared, str) else list(shared)
        self._known: dict[tuple[str, ...], list[str]] = {}
        if self._patterns is not None:
            self._matching(self._patterns)

    def probe(
        self, losses: Mapping[str, Tensor], seeds: Sequence[Tensor], *, keep_all: bool = False, free: bool = False
    ) -> Probes:
        """Return the gradients of each loss, `seeds` being the gradients that arrive at them.

        Args:
            losses: by task.
            seeds: one a task.
            keep_all: also return the gradients with respect to all parameters.
            free: let the graph go with the last probe.
        """
        names, values = tuple(losses), list(losses.values())
        if self._gramian == "features" and not keep_all:
            edges: list[Any] = list(shared_features(values))
            if not edges:
                raise _nothing_shared(names)
            return Probes(_gradients(values, seeds, edges, free=free))
        if names not in self._known:
            self._known[names] = self._choose(names, values)
        chosen = self._known[names]
        if not keep_all:
            return Probes(_gradients(values, seeds, [self._parameters[path] for path in chosen], free=free))
        candidates = [path for path, p in self._parameters.items() if p.requires_grad]
        grads = _gradients(values, seeds, [self._parameters[path] for path in candidates], free=free)
        every = [self._spread(candidates, row) for row in grads]
        place = {path: i for i, path in enumerate(self._parameters)}
        return Probes([tuple(row[place[path]] for path in chosen) for row in every], every)

    def _spread(self, candidates: Sequence[str], row: Grads) -> Grads:
        found = dict(zip(candidates, row, strict=True))
        return tuple(found.get(path) for path in self._parameters)

    def _choose(self, names: tuple[str, ...], losses: Sequence[Tensor]) -> list[str]:
        if has_reentrant_checkpoint(losses):
            raise _reentrant()
        reached = reached_parameters(losses)
        counts = {path: sum(id(p) in ids for ids in reached) for path, p in self._parameters.items()}
        shared = [path for path, count in counts.items() if count >= 2]
        if self._patterns is not None:
            matching = self._matching(self._patterns)
            shared = [path for path, count in counts.items() if count and path in matching]
        if not shared:
            raise _nothing_shared(names)
        if self._gramian != "last":
            return shared
        last = last_used(losses, {id(self._parameters[path]): path for path in shared}, shared)
        owner = last.rpartition(".")[0]
        return [path for path in shared if path.rpartition(".")[0] == owner]

    def _matching(self, patterns: Sequence[str]) -> set[str]:
        found = set()
        for pattern in patterns:
            hits = {p for p in self._parameters if fnmatchcase(p, pattern) or p.startswith(pattern + ".")}
            if not hits:
                raise UnknownPathError(pattern, self._parameters, model_name="the model", kind="parameter path")
            found |= hits
        return found


def _gradients(losses: Sequence[Tensor], seeds: Sequence[Tensor], inputs: Sequence[Any], *, free: bool) -> list[Grads]:
    last = len(losses) - 1
    try:
        return [
            torch.autograd.grad(loss, inputs, seed, retain_graph=not (free and i == last), allow_unused=True)
            for i, (loss, seed) in enumerate(zip(losses, seeds, strict=True))
        ]
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise _reentrant() from error
        if "donated" in str(error):
            raise ConfigError(
                "surgery runs several passes over one graph, which torch.compile's donated buffers forbid: "
                "set torch._functorch.config.donated_buffer = False before compiling."
            ) from error
        raise


def _reentrant() -> ConfigError:
    return ConfigError(
        "surgery takes gradients of single tasks, which reentrant activation checkpointing forbids: "
        "use checkpoint(..., use_reentrant=False)."
    )


def _nothing_shared(names: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"tasks {', '.join(map(repr, names))} share nothing that requires a gradient: there is nothing to operate on. "
        "Check that their losses come from one model, and that the shared part is not frozen."
    )
