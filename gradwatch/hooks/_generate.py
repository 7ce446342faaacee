"""Generation, token by token: a cache across the passes of a KV cache, and interventions at tokens by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, HookNeverFired, UnknownPathError
from ._cache import Cache, Leaves
from ._functions import Intervention
from ._points import PAIR_PORTS, Point, RawCall
from ._run import LAST, CacheOptions, Recorder, hooks_in_place
from ._silence import check_fired, check_missing

if TYPE_CHECKING:
    from ._manager import HookManager
    from ._patterns import Resolver

__all__ = ["GenerationCache", "generate"]

Tokens = int | slice | Sequence[int] | str


class _Passes:
    """Which columns of the batch each pass of the model computes, and where each row's first token stands."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.padding: Tensor | None = None
        self.num_rows = 0
        self.prompt_length = 0

    def __call__(self, raw: RawCall, point: Point) -> None:
        given: dict[Any, Any] = {**dict(enumerate(raw.args)), **raw.kwargs}
        names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", 0)
        tokens = next((given[n] for n in names if isinstance(given.get(n), Tensor)), None)
        if tokens is None:
            raise ConfigError("the model's forward was called without tokens: its passes can't be told apart.")
        begin, length = _past_length(given), int(tokens.shape[1])
        decoding = "decoder_input_ids" in given or "decoder_inputs_embeds" in given
        mask = given.get("decoder_attention_mask" if decoding else "attention_mask")
        if not self.spans:
            self.num_rows, self.prompt_length = int(tokens.shape[0]), begin + length
            self.padding = _padding(mask, self.num_rows)
        elif tokens.shape[0] != self.num_rows:
            raise ConfigError(f"the batch changed from {self.num_rows} rows to {tokens.shape[0]} while generating.")
        self.spans.append((begin, begin + length))

    def of(self, columns: int, device: Any) -> Tensor | None:
        """Return the number of the token in each column of the present pass, (rows, columns); negative for padding."""
        begin, end = self.spans[-1] if self.spans else (0, columns)
        if columns != end - begin:
            return None
        numbers = torch.arange(begin, end, device=device)
        return numbers if self.padding is None else numbers - self.padding.to(device)[:, None]


def _past_length(given: Mapping[Any, Any]) -> int:
    """Return how many columns a KV cache among the arguments holds; its name differs between versions."""
    lengths = (getattr(value, "get_seq_length", None) for value in given.values())
    return next((int(length()) for length in lengths if callable(length)), 0)


def _padding(mask: Any, num_rows: int) -> Tensor:
    """Return how many columns of padding stand before each row's first token."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.zeros(num_rows, dtype=torch.long)
    return (mask != 0).long().cumsum(dim=1).eq(0).sum(dim=1).cpu()


class _AtTokens(Intervention):
    """Lets a function act at some tokens alone, in whatever pass they come."""

    is_pure = True

    def __init__(self, fn: Any, tokens: Tokens, passes: _Passes) -> None:
        super().__init__(fn)
        self.tokens, self.passes = tokens, passes
        self.has_acted = False

    def intervene(self, tensor: Tensor, point: Point) -> Tensor | None:
        dim = 2 if point.port in PAIR_PORTS else 1
        numbers = None if tensor.dim() <= dim else self.passes.of(tensor.shape[dim], tensor.device)
        if numbers is None:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no dimension for the tokens of this pass")
        chosen = self._chosen(numbers.expand(tensor.shape[0], -1))
        if not chosen.any():
            return None
        self.has_acted = True
        shown = tensor.clone()
        new = self.fn(shown, point) if self.fn is not None else None
        new = shown if new is None else new
        shape = [tensor.shape[0], *[1] * (tensor.dim() - 1)]
        shape[dim] = tensor.shape[dim]
        return torch.where(chosen.reshape(shape), new, tensor)

    def _chosen(self, numbers: Tensor) -> Tensor:
        tokens = self.tokens
        first = self._first_generated(numbers)
        if isinstance(tokens, str):
            if tokens not in ("prompt", "generated"):
                raise ValueError(f"tokens are numbers, a slice, 'prompt' or 'generated'. Got {tokens!r}")
            return (numbers >= first) if tokens == "generated" else (numbers >= 0) & (numbers < first)
        if isinstance(tokens, slice):
            start, stop, step = tokens.start or 0, tokens.stop, tokens.step or 1
            if start < 0 or (stop is not None and stop < 0) or step < 1:
                raise ValueError(f"a slice of tokens counts from the first: 0 or more. Got {tokens}")
            found = (numbers >= start) & ((numbers - start) % step == 0)
            return found if stop is None else found & (numbers < stop)
        wanted = [tokens] if isinstance(tokens, int) else [int(t) for t in tokens]
        if any(number < 0 for number in wanted):
            raise ValueError(f"tokens count from the first: 0 or more. Got {wanted}")
        return torch.isin(numbers, torch.tensor(wanted, device=numbers.device))

    def _first_generated(self, numbers: Tensor) -> Tensor:
        padding = self.passes.padding
        if padding is None:
            return torch.full((1, 1), self.passes.prompt_length, device=numbers.device)
        return (self.passes.prompt_length - padding.to(numbers.device))[:, None]


class _TokenRecorder(Recorder):
    """Keeps what each pass shows."""

    def __init__(self, options: CacheOptions, passes: _Passes) -> None:
        super().__init__(options)
        self.passes = passes
        self.kept_of: dict[str, list[tuple[int, int, dict[int, Leaves]]]] = {}

    def __call__(self, tensor: Tensor, point: Point) -> None:
        begin, end = self.passes.spans[-1] if self.passes.spans else (0, -1)
        number = len(self.passes.spans)
        known = self.kept_of.setdefault(point.spot.name, [])
        if not known or known[-1][0] != number:
            known.append((number, begin if end >= 0 else -1, {}))
        known[-1][2].setdefault(point.call, {})[point.leaf] = self.kept(tensor)


class GenerationCache(Cache):
    """Activations of all passes of a generation, by name and by token.

    `cache["blocks.3:output"]` is (batch, columns, ...): what prompt and generated tokens were given by the pass that
    computed them, side by side. Keys and values (ports `k`, `v`) are those of the last pass, which sees all. What has
    no dimension for tokens is kept call by call, one for each pass. The last token generated is in no pass.

    Attributes:
        padding: columns of padding before each row's first token, (batch,).
        prompt_length: columns of the prompt, padding included.
        num_columns: columns computed.
    """

    def __init__(self, recorder: _TokenRecorder, resolver: Resolver) -> None:
        passes = recorder.passes
        values = {name: _stitched(name, kept, passes.spans) for name, kept in recorder.kept_of.items()}
        super().__init__(values, resolver)
        self.prompt_length = passes.prompt_length
        self.num_columns = max((end for _, end in passes.spans), default=0)
        self.padding = passes.padding if passes.padding is not None else torch.zeros(1, dtype=torch.long)

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
        if int(columns.max()) >= rows.shape[1] or bool((columns < self.padding).any()):
            known = [str(i) for i in range(self.num_columns - int(self.padding.max()))]
            raise UnknownPathError(str(number), known, model_name="the generation", kind="token")
        found = [rows[row, int(column)] for row, column in enumerate(columns.expand(rows.shape[0]))]
        return torch.stack(found)

    def generated(self, name: Any) -> Tensor:
        """Return what is held of the tokens that were generated, but for the last: (batch, tokens, ...)."""
        tensor = self[name]
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name!r} is no one tensor.")
        return tensor[:, self.prompt_length :]


def _stitched(name: str, kept: list[tuple[int, int, dict[int, Leaves]]], spans: list[tuple[int, int]]) -> list[Leaves]:
    """Return what the passes kept at one point, side by side in the order of tokens."""
    port = name.rpartition(":")[2]
    if port in ("k", "v"):
        return [leaves for _, leaves in sorted(kept[-1][2].items())]
    dim = 2 if port in PAIR_PORTS else 1
    single = [(number, leaves) for number, _, calls in kept for leaves in calls.values()]
    if any(len(calls) != 1 for _, _, calls in kept) or not all(_fits(n, leaves, dim, spans) for n, leaves in single):
        return [leaves for _, leaves in single]
    found: Leaves = {}
    for leaf in single[0][1]:
        pieces: dict[int, Tensor] = {}
        for number, leaves in single:
            begin = spans[number - 1][0]
            for column, piece in enumerate(leaves[leaf].unbind(dim)):
                pieces[begin + column] = piece  # what is computed again takes the place of what was there
        ordered = [pieces[column] for column in sorted(pieces)]
        found[leaf] = torch.stack(_widened(ordered, port), dim=dim)
    return [found]


def _fits(number: int, leaves: Leaves, dim: int, spans: list[tuple[int, int]]) -> bool:
    if not number:
        return False
    begin, end = spans[number - 1]
    return all(t.dim() > dim and t.shape[dim] == end - begin for t in leaves.values())


def _widened(rows: list[Tensor], port: str) -> list[Tensor]:
    """Return rows of pairs as wide as the widest: no query sees the keys that come after its pass."""
    if port not in PAIR_PORTS:
        return rows
    width = max(row.shape[-1] for row in rows)
    filling = torch.finfo(rows[0].dtype).min if port == "scores" else 0.0
    return [torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=filling) for row in rows]


def generate(
    manager: HookManager,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    points: Any,
    hooks: Sequence[Any],
    options: CacheOptions,
    missing: str = "raise",
) -> tuple[Any, GenerationCache]:
    """See `HookManager.generate`."""
    if not callable(getattr(manager.model, "generate", None)):
        raise ConfigError(f"{type(manager.model).__name__} has no `generate`.")
    settings = kwargs.get("generation_config")
    beams = kwargs.get("num_beams") or getattr(settings, "num_beams", None) or 1
    if beams > 1:
        raise ConfigError("a beam search moves rows about between passes: hooks go with num_beams=1.")
    passes = _Passes()
    recorder = _TokenRecorder(options, passes)
    check_missing(missing)
    specs = [_bound(spec, passes) for spec in hooks]
    first = [(":input", passes)], {"raw": True, "priority": -LAST}
    last = [(_spots(manager, points), recorder)], {"priority": LAST}
    with hooks_in_place(manager, first, (specs, {}), last) as asked:
        output = manager.model.generate(*args, **kwargs)  # type: ignore[operator]
        silent = check_fired(manager, asked[1:], missing=missing)
        for _, hook in asked[1:] if missing == "raise" else ():
            if isinstance(hook.fn, _AtTokens) and not hook.fn.has_acted:
                reason = f"no token that was computed is among {hook.fn.tokens!r}"
                raise HookNeverFired(hook.id, hook.points[0].name, "condition", reason)
    cache = GenerationCache(recorder, manager._resolver)
    cache.missing.update(silent)
    return output, cache


def _bound(spec: Any, passes: _Passes) -> tuple[Any, Any]:
    if len(spec) == 2:
        return tuple(spec)
    points, fn, tokens = spec
    return points, _AtTokens(fn, tokens, passes)


def _spots(manager: HookManager, points: Any) -> Any:
    from ._run import _activations

    if points is None:
        points = [f"{path}:output" for path in manager.layers]
    return _activations(manager, points, False)
