"""Generation, token by token: a cache across the passes of a KV cache, and interventions at tokens by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, HookNeverFired
from ._functions import Intervention
from ._generation_cache import GenerationCache, Kept
from ._passes import Passes, generating
from ._patch import numbers_of
from ._points import PAIR_PORTS, Point
from ._run import LAST, CacheOptions, Recorder, hooks_in_place
from ._silence import check_fired, check_missing

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["generate"]


class _AtTokens(Intervention):
    """Lets a function act at some tokens alone, in whatever pass they come."""

    is_pure = True

    def __init__(self, fn: Any, tokens: Any, passes: Passes) -> None:
        super().__init__(fn)
        self.asked, self.tokens, self.passes = tokens, _checked(tokens), passes
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
        first = self.passes.first_generated(numbers)
        if isinstance(tokens, str):
            return (numbers >= first) if tokens == "generated" else (numbers >= 0) & (numbers < first)
        if isinstance(tokens, slice):
            start, stop, step = tokens.start or 0, tokens.stop, tokens.step or 1
            found = (numbers >= start) & ((numbers - start) % step == 0)
            return found if stop is None else found & (numbers < stop)
        return torch.isin(numbers, torch.tensor(tokens, device=numbers.device))


def _checked(tokens: Any) -> str | slice | list[int]:
    """Return which tokens are meant: `"prompt"`, `"generated"`, a slice, or their numbers (of a mask, its Trues).

    Raises:
        ConfigError: something else, or a number that does not count from the first.
    """
    if isinstance(tokens, str):
        if tokens not in ("prompt", "generated"):
            raise ConfigError(f"tokens are numbers, a mask, a slice, 'prompt' or 'generated'. Got {tokens!r}.")
        return tokens
    if isinstance(tokens, slice):
        start, stop, step = tokens.start or 0, tokens.stop, tokens.step or 1
        if start < 0 or (stop is not None and stop < 0) or step < 1:
            raise ConfigError(f"a slice of tokens counts from the first: 0 or more. Got {tokens}.")
        return tokens
    given = numbers_of(tokens, "tokens")
    if given is None:
        raise ConfigError("tokens are numbers, a mask, a slice, 'prompt' or 'generated'. Got None.")
    found = [given] if isinstance(given, int) else given
    assert not isinstance(found, slice)
    if any(number < 0 for number in found):
        raise ConfigError(f"tokens count from the first: 0 or more. Got {found}.")
    return found


class _TokenRecorder(Recorder):
    """Keeps what each pass shows."""

    def __init__(self, options: CacheOptions, passes: Passes) -> None:
        super().__init__(options)
        self.passes = passes
        self.kept_of: dict[str, Kept] = {}

    def __call__(self, tensor: Tensor, point: Point) -> None:
        number = len(self.passes.spans)
        known = self.kept_of.setdefault(point.spot.name, [])
        if not known or known[-1][0] != number:
            known.append((number, {}))
        known[-1][1].setdefault(point.call, {})[point.leaf] = self.kept(tensor)


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
    passes = Passes(manager.model, args, kwargs)
    recorder = _TokenRecorder(options, passes)
    check_missing(missing)
    specs = [_bound(spec, passes) for spec in hooks]
    first = [([(m, "input") for m in generating(manager.model)], passes)], {"raw": True, "priority": -LAST}
    last = [(_spots(manager, points), recorder)], {"priority": LAST}
    with hooks_in_place(manager, first, (specs, {}), last) as asked:
        output = manager.model.generate(*args, **{**kwargs, **passes.settings()})  # type: ignore[operator]
        silent = check_fired(manager, asked[1:], missing=missing)
        for _, hook in asked[1:] if missing == "raise" else ():
            if isinstance(hook.fn, _AtTokens) and not hook.fn.has_acted:
                reason = f"no token that was computed is among {hook.fn.asked!r}"
                raise HookNeverFired(hook.id, hook.points[0].name, "condition", reason)
    output = passes.finish(output)
    cache = GenerationCache(recorder.kept_of, passes, manager._resolver)
    cache.missing.update(silent)
    return output, cache


def _bound(spec: Any, passes: Passes) -> tuple[Any, Any]:
    if len(spec) == 2:
        return tuple(spec)
    points, fn, tokens = spec
    return points, _AtTokens(fn, tokens, passes)


def _spots(manager: HookManager, points: Any) -> Any:
    from ._run import _activations

    if points is None:
        points = [f"{path}:output" for path in manager.layers]
    return _activations(manager, points, False)
