"""`HookManager`: the door to everything here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ._base import BaseManager
from ._cache import Cache
from ._run import CacheOptions, run_with_cache, run_with_hooks

if TYPE_CHECKING:
    from ._capture import Capture
    from ._coverage import Coverage
    from ._hook import Hook
    from ._monitor import Monitor
    from ._profile import Profile
    from ._sweep import Sweep

__all__ = ["HookManager"]


class HookManager(BaseManager):
    """Hooks on one model: look into it, change what flows through it, and leave no trace.

    Args:
        model: any module; nothing is written on it.
        aliases: other names for hook points, with placeholders:
            `{"blocks.{i}.hook_resid_post": "transformer.h.{i}:output"}`.
        research_names: also give models that are known (torch's `nn.Transformer*`; Hugging Face GPT-2, Llama, BERT)
            the usual research names: `blocks.0.hook_resid_pre`, `blocks.0.attn.hook_z`, ...
        layers: path of the list of blocks that "layer 4" counts in, where it can't be told.

    Attributes:
        model: the model.
        store: a dict that all hooks share, as `hook.context.store`.

    Example:
        >>> with HookManager(model) as hooks:
        ...     hooks.add("blocks.*.mlp:output", lambda tensor, point: print(point.name, tensor.norm()))
        ...     model(x)
    """

    def run_with_hooks(self, *args: Any, hooks: Sequence[Any] = (), stop_at: Any = None, **kwargs: Any) -> Any:
        """Run the model once with hooks for this run only: `hooks=[("blocks.5.attn:output", fn), ...]`.

        Hooks on gradients act when backward runs through this run's graph, also after this call. They fire in the
        calling thread alone, and whatever happens the model is left as it was.

        Args:
            *args: of the model.
            hooks: (points, fn) pairs, as for `add`.
            stop_at: end the run at this point, and return what is there.
            **kwargs: of the model.
        """
        return run_with_hooks(self, args, kwargs, hooks=hooks, stop_at=stop_at)

    def run_with_cache(  # noqa: PLR0913
        self,
        *args: Any,
        points: Any = None,
        gradients: bool | Callable[[Any], Tensor] = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        clone: bool = True,
        detach: bool = True,
        stop_at: Any = None,
        hooks: Sequence[Any] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Cache]:
        """Run the model once and bring back its activations: `(output, cache)`.

        Args:
            *args: of the model.
            points: what to keep; by default all outputs and all that has an alias.
            gradients: also the gradients of a loss with respect to what is kept: True where the model returns the loss,
                else a function of its output. Parameters' `.grad` is not touched, and frozen models work.
            device: move what is kept there.
            dtype: convert floating tensors.
            clone: copy, so that a later in-place operation does not change what is kept.
            detach: keep no graph.
            stop_at: end the run at this point, and return what is there.
            hooks: (points, fn) pairs that act in this run; what is kept is what they leave.
            model_kwargs: keyword arguments of the model whose names are taken here.
            **kwargs: other keyword arguments of the model.

        Returns:
            The output, and a `Cache`.
        """
        options = CacheOptions(gradients=gradients, device=device, dtype=dtype, clone=clone, detach=detach)
        kwargs = {**kwargs, **(model_kwargs or {})}
        return run_with_cache(self, args, kwargs, points=points, stop_at=stop_at, hooks=hooks, options=options)

    def capture(  # noqa: PLR0913
        self,
        points: Any,
        *,
        inputs: bool = False,
        outputs: bool = True,
        max_states: int | None = None,
        memory_limit_mb: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        clone: bool = True,
        cleanup_interval: int | None = None,
        store: Any = None,
        id: str | None = None,  # noqa: A002
    ) -> Capture:
        """Keep what modules take and give, call by call, within bounds: `hooks.capture(4, inputs=True, max_states=16)`.

        Args:
            points: modules, as for `add`; a port named here (`"encoder.*:input"`) counts unless both are asked for.
            inputs: keep what goes in.
            outputs: keep what comes out.
            max_states: most states held, over all modules together; then the oldest goes.
            memory_limit_mb: most MiB held.
            device: move states there.
            dtype: convert floating tensors.
            clone: copy, so that a later in-place operation does not change a state.
            cleanup_interval: after this many dropped states, give freed device memory back to the driver.
            store: folder, or `ActivationStore`: write states to disk, one file for each forward pass.
            id: of the hook.
        """
        from ._capture import CaptureOptions, capture

        options = CaptureOptions(
            max_states=max_states,
            memory_limit_mb=memory_limit_mb,
            device=device,
            dtype=dtype,
            clone=clone,
            cleanup_interval=cleanup_interval,
        )
        return capture(self, points, inputs=inputs, outputs=outputs, options=options, store=store, hook_id=id)

    def monitor(self, points: Any = "*:output", **options: Any) -> Monitor:
        """Keep running statistics: mean, std, rms, absmax, share of zeros, non-finite count by point. See `Monitor`."""
        from ._monitor import Monitor

        monitor = Monitor()
        monitor.hook = self.add(points, monitor, **options)
        return monitor

    def break_when(self, points: Any, condition: Any, *, action: Any = "raise", **options: Any) -> Hook:
        """Stop the first time that `condition(tensor, point)` holds.

        Args:
            points: as for `add`.
            condition: a function, or ready-made: `non_finite`, `exceeds(x)`, `dead`.
            action: `"raise"` a `HookBreak` with the tensor, point and step; `"debugger"`; or a function of the
                `HookBreak`.
            **options: as for `add`.

        Returns:
            The hook; `hook.fn.hit` is what was found, and `hook.reset()` arms it again.
        """
        from ._breakpoints import Break

        return self.add(points, Break(condition, action), **options)

    def sweep(  # noqa: PLR0913
        self,
        points: Any,
        positions: Sequence[int] | None = None,
        metric: Callable[[Any], Any] | None = None,
        *,
        inputs: Any,
        source: Any = None,
        heads: Sequence[int] | None = None,
        intervention: Callable[..., Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Sweep:
        """Intervene at one point and position (or head) at a time, and measure: activation patching.

        Args:
            points: the rows, as for `add`.
            positions: the columns.
            metric: of the model's output, a number.
            inputs: of the run that is patched (a tensor, or a tuple of arguments).
            source: a `Cache` of the other run, patched in.
            heads: the columns, instead of positions.
            intervention: instead of patching, called with `positions=` or `heads=`: `zero`, for ablations.
            model_kwargs: keyword arguments of the model.
            progress: show a bar on stderr.

        Returns:
            A `Sweep`: `.values` of shape (points, positions), `.plot(path)`.
        """
        from ._sweep import sweep

        if metric is None:
            raise ConfigError("a sweep needs a `metric`: a function of the model's output that gives a number.")
        return sweep(
            self,
            points,
            positions,
            metric,
            inputs=inputs,
            source=source,
            heads=heads,
            intervention=intervention,
            model_kwargs=model_kwargs,
            progress=progress,
        )

    def profile(self, points: Any = "*") -> Profile:
        """Time every module, forward and backward: `with hooks.profile() as profile: ...`. See `Profile`."""
        from ._profile import Profile

        return Profile(self, points)

    def coverage(self) -> Coverage:
        """Tell for each hook and point whether it fired and, if not, why."""
        from ._coverage import coverage

        return coverage(self)
