"""What a generation brings back: activations by name and by token, put together from the passes of a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownPathError
from ._cache import Cache, Leaves
from ._passes import Passes
from ._patterns import Resolver
from ._points import PAIR_PORTS

__all__ = ["GenerationCache", "Kept"]

Kept = list[tuple[int, dict[int, Leaves]]]
"""What each pass kept at one point: (number of the pass, from 1; calls)."""


_OF_KEYS = ("k", "v", *PAIR_PORTS)
"""Ports with a dimension for keys."""


class GenerationCache(Cache):
    """Activations of all passes of a generation, by name and by token.

    `cache["blocks.3:output"]` is (batch, columns, ...): what prompt and generated tokens were given by the pass that
    computed them, side by side; of a beam search, those of the rows that were returned. Keys and values (ports `k`,
    `v`) are as the last pass that has them sees them. What has no dimension for tokens is kept call by call, one for
    each pass. The last token generated is in no pass.

    Attributes:
        padding: columns of padding before each row's first token, (batch,).
        prompt_length: columns of the prompt, padding included.
        first_column: the first that was computed: above 0 where the run was given a cache that holds some already.
        num_columns: columns of the prompt and what was generated, but for the last.
    """

    def __init__(self, kept: dict[str, Kept], passes: Passes, resolver: Resolver) -> None:
        ports = {name: name.rpartition(":")[2] for name in kept}
        crossing = _crossing(resolver) if {*_OF_KEYS} & {*ports.values()} else set()
        stitched = {n: _Stitching(passes, p, crosses=n.rpartition(":")[0] in crossing) for n, p in ports.items()}
        super().__init__({name: stitched[name].of(passed) for name, passed in kept.items()}, resolver)
        self.prompt_length, self.first_column = passes.prompt_length, passes.first_column
        self.num_columns = passes.num_columns
        padding = torch.zeros(1, dtype=torch.long) if passes.padding is None else passes.padding
        rows = passes.rows(1)
        self.padding = padding if rows is None else padding[rows.cpu()]

    def token(self, name: Any, number: int) -> Tensor:
        """Return what is held of one token, (batch, ...): 0 is each row's first, padding not counted; -1 the last.

        Raises:
            UnknownPathError: there is no such token, or no such name.
        """
        tensor = self[name]
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            raise ConfigError(f"{name!r} is no one tensor with a dimension for tokens.")
        point = self._resolver.resolve(name)[0] if isinstance(name, str) else None
        pairs = point is not None and point.port in PAIR_PORTS
        rows = tensor.transpose(1, 2) if pairs else tensor
        columns = self.padding + number if number >= 0 else torch.full_like(self.padding, self.num_columns + number)
        first = torch.clamp(self.padding, min=self.first_column)
        if int(columns.max()) >= self.first_column + rows.shape[1] or bool((columns < first).any()):
            begin, end = int((first - self.padding).max()), self.num_columns - int(self.padding.max())
            known = [str(i) for i in range(begin, end)]
            raise UnknownPathError(str(number), known, model_name="the generation", kind="token")
        places = (columns - self.first_column).expand(rows.shape[0])
        return torch.stack([rows[row, int(place)] for row, place in enumerate(places)])

    def generated(self, name: Any) -> Tensor:
        """Return what is held of the tokens that were generated, but for the last: (batch, tokens, ...)."""
        tensor = self[name]
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name!r} is no one tensor.")
        point = self._resolver.resolve(name)[0] if isinstance(name, str) else None
        dim = 2 if point is not None and point.port in PAIR_PORTS else 1
        start = max(self.prompt_length - self.first_column, 0)
        return tensor.narrow(dim, min(start, tensor.shape[dim]), max(tensor.shape[dim] - start, 0))


class _Stitching:
    """Puts what the passes kept at one point side by side, in the order of tokens."""

    def __init__(self, passes: Passes, port: str, *, crosses: bool) -> None:
        self.passes, self.port, self.crosses = passes, port, crosses
        self.columns = range(passes.first_column, passes.num_columns)

    def of(self, kept: Kept) -> list[Leaves]:
        """Return one call's leaves; of what has no dimension for tokens, those of each call."""
        single = [(number, self._of_rows(number, leaves)) for number, calls in kept for leaves in calls.values()]
        if self.port in ("k", "v"):
            last = [self._of_rows(kept[-1][0], leaves) for _, leaves in sorted(kept[-1][1].items())]
            return last if self.crosses or len(last) != 1 else [self._columns_of_keys(single)]
        dim = 2 if self.port in PAIR_PORTS else 1
        once = all(len(calls) == 1 for _, calls in kept)
        if not once or not all(self._fits(number, leaves, dim) for number, leaves in single):
            return [leaves for _, leaves in single]
        return [{leaf: self._side_by_side(leaf, single, dim) for leaf in single[0][1]}]

    def _side_by_side(self, leaf: str, kept: list[tuple[int, Leaves]], dim: int) -> Tensor:
        pieces: dict[int, Tensor] = {}
        for number, leaves in kept:
            whole = self._all_keys(number, leaves[leaf]) if self.port in PAIR_PORTS else leaves[leaf]
            begin = self.passes.spans[number - 1][0]
            # What is computed again takes the place of what was there.
            pieces.update(enumerate(whole.unbind(dim), begin))
        return torch.stack([pieces[column] for column in self.columns if column in pieces], dim=dim)

    def _columns_of_keys(self, kept: list[tuple[int, Leaves]]) -> Leaves:
        """Return keys or values of all columns: of each as the last pass that sees it has it (a window moves on)."""
        found: dict[str, dict[int, Tensor]] = {leaf: {} for leaf in kept[-1][1]}
        for number, leaves in reversed(kept):
            for leaf, tensor in leaves.items():
                begin = self._first_key(number, tensor.shape[1])
                for column in range(begin, begin + tensor.shape[1]):
                    if column not in found[leaf] and column in self._all_columns():
                        found[leaf][column] = tensor[:, column - begin]
            if all(len(pieces) == len(self._all_columns()) for pieces in found.values()):
                break
        return {leaf: torch.stack([p[c] for c in sorted(p)], dim=1) for leaf, p in found.items()}

    def _all_columns(self) -> range:
        """Return the columns that keys may be of: also those that a cache held before."""
        return range(self.passes.num_columns)

    def _first_key(self, number: int, num_keys: int) -> int:
        """Return the column of the first key: a window ends where its pass ends, all other keys begin at the first."""
        end = self.passes.spans[number - 1][1]
        return 0 if self.crosses else max(end - num_keys, 0)

    def _all_keys(self, number: int, pairs: Tensor) -> Tensor:
        """Return pairs with a column for each key: no query sees those outside its pass, or after it."""
        if self.crosses:
            return pairs
        filling = torch.finfo(pairs.dtype).min if self.port == "scores" else 0.0
        before = self._first_key(number, pairs.shape[-1])
        after = self.passes.num_columns - before - pairs.shape[-1]
        return torch.nn.functional.pad(pairs, (before, after), value=filling)

    def _fits(self, number: int, leaves: Leaves, dim: int) -> bool:
        if not number:
            return False
        begin, end = self.passes.spans[number - 1]
        return all(t.dim() > dim and t.shape[dim] == end - begin for t in leaves.values())

    def _of_rows(self, number: int, leaves: Leaves) -> Leaves:
        """Return what belongs to the rows that were returned; where one of them had ended, not-a-number."""
        rows = self.passes.rows(number) if number else None
        if rows is None:
            return leaves
        return {leaf: _taken(tensor, rows, self.passes.num_rows) for leaf, tensor in leaves.items()}


def _crossing(resolver: Resolver) -> set[str]:
    """Return what attends to an encoder: its keys are no tokens that are generated."""
    return {point.path for name, point in resolver.aliases.items() if "cross_attn." in name and point.available}


def _taken(tensor: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    if not tensor.dim() or tensor.shape[0] != num_rows:
        return tensor
    rows = rows.to(tensor.device)
    taken = tensor[rows.clamp(min=0)]
    ended = (rows < 0).reshape(-1, *[1] * (taken.dim() - 1))
    return taken.masked_fill(ended, torch.nan) if taken.is_floating_point() else taken
