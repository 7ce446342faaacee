"""What research asks of a manager beyond single runs: sweeps, attributions, generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import ConfigError
from ._base import BaseManager

if TYPE_CHECKING:
    from ._generation_cache import GenerationCache
    from ._manager import HookManager
    from ._sweep import Sweep

__all__ = ["ResearchManager"]


class ResearchManager(BaseManager):
    """See `HookManager`."""

    def sweep(  # noqa: PLR0913
        self,
        points: Any,
        positions: Sequence[int] | None = None,
        metric: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
        *,
        inputs: Any,
        source: Any = None,
        heads: Sequence[int] | None = None,
        source_positions: Any = None,
        intervention: Callable[..., Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> Sweep:
        """Intervene at one point and position (or head, or both) at a time, and measure: activation patching.

        Args:
            points: the rows, as for `add`.
            positions: the columns.
            metric: of the model's output: a number or a vector; or a dict of several.
            inputs: of the run that is patched: a tensor, a tuple of arguments, or a mapping of keyword arguments.
            source: a `Cache` of the other run, patched in.
            heads: the columns, instead of positions; with both, each head at each position.
            source_positions: where a position's value comes from in the source, if not from the same position: one for
                all, one for each position, or a mapping.
            intervention: instead of patching, called with `positions=` and/or `heads=`: `zero`, for ablations.
            model_kwargs: keyword arguments of the model.
            batch_size: interventions that share one forward, side by side in the batch; numbers then agree to rounding.
                What the model gives as one number for the whole batch (a loss) is nan then.
            progress: show a bar on stderr.

        Returns:
            A `Sweep`: `.values` of shape (points, positions), `.plot(path)`.
        """
        from ._sweeps import SweepOptions, sweep

        if metric is None:
            raise ConfigError("a sweep needs a `metric`: a function of the model's output that gives a number.")
        options = SweepOptions(
            positions=positions,
            heads=heads,
            source=source,
            source_positions=source_positions,
            intervention=intervention,
            batch_size=batch_size,
            progress=progress,
        )
        manager = cast("HookManager", self)
        return sweep(manager, points, metric, inputs=inputs, model_kwargs=model_kwargs, options=options)

    def attribute(
        self,
        points: Any,
        positions: Sequence[int] | None = None,
        metric: Callable[[Any], Any] | None = None,
        *,
        inputs: Any,
        source: Any = None,
        heads: Sequence[int] | None = None,
        source_positions: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Sweep:
        """Estimate a whole sweep in two passes: gradient times difference (attribution patching).

        To first order in the difference, patching changes the metric by the gradient times the difference of the two
        runs (Nanda, "Attribution Patching", 2023; Syed et al., "Attribution Patching Outperforms Automated Circuit
        Discovery", 2023, arXiv:2310.10348).

        Args:
            points: the rows, as for `add`.
            positions: the columns.
            metric: of the model's output, one number that gradients go through.
            inputs: of the run that would be patched.
            source: a `Cache` of the other run, or its inputs; None for zeros (ablation).
            heads: as for `sweep`.
            source_positions: as for `sweep`.
            model_kwargs: keyword arguments of the model.

        Returns:
            A `Sweep`, whose values estimate what `sweep` would measure: the baseline plus the estimated change.
        """
        from ._sweeps import SweepOptions, attribute

        if metric is None:
            raise ConfigError("an attribution needs a `metric`: a function of the model's output.")
        options = SweepOptions(positions=positions, heads=heads, source=source, source_positions=source_positions)
        manager = cast("HookManager", self)
        return attribute(manager, points, metric, inputs=inputs, model_kwargs=model_kwargs, options=options)

    def generate(
        self,
        *args: Any,
        points: Any = None,
        hooks: Sequence[Any] = (),
        device: Any = None,
        dtype: torch.dtype | None = None,
        clone: bool = True,
        missing: str = "raise",
        **kwargs: Any,
    ) -> tuple[Any, GenerationCache]:
        """Let the model generate, with hooks and a cache by token: `(output, cache)`.

        In any form: a KV cache or none, sampling, beams (hooks act on all of them; the cache is that of the rows that
        are returned), a prompt in pieces or after an earlier turn's cache, guesses of an assistant.

        Args:
            *args: of `model.generate`.
            points: what to keep; by default the outputs of all layers.
            hooks: (points, fn) pairs that act in every pass; (points, fn, tokens) triples act at some tokens alone: a
                number, a list, a mask, a slice, `"prompt"` or `"generated"`. Tokens count from 0 in each row, padding
                on the left not counted.
            device: move what is kept there.
            dtype: convert floating tensors.
            clone: copy what is kept.
            missing: `"raise"` where a hook did nothing at all, or `"ignore"`.
            **kwargs: of `model.generate`.

        Returns:
            What the model generated, and a `GenerationCache`.

        Raises:
            ConfigError: the model has no `generate`, or its beams move and nothing tells how.
            HookNeverFired: a hook's point, or none of its tokens, was computed.

        Example:
            >>> steer = ("layer 5", add(direction, factor=4.0), slice(8, 20))
            >>> tokens, cache = hooks.generate(prompt, hooks=[steer], max_new_tokens=30)
            >>> cache.token("layer 5", 8)  # (batch, width)
        """
        from ._generate import generate
        from ._run import CacheOptions

        options = CacheOptions(device=device, dtype=dtype, clone=clone)
        args, kwargs = self._tokens(args, kwargs)
        manager = cast("HookManager", self)
        return generate(manager, args, kwargs, points=points, hooks=hooks, options=options, missing=missing)
