"""`HookManager`: the door to everything here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._uncopied import Uncopied
from ..errors import UnknownNameError
from ._cache import Cache
from ._layers import LayerRun
from ._research import ResearchManager
from ._run import CacheOptions, run_with_cache, run_with_hooks
from ._silence import model_kwargs_of

if TYPE_CHECKING:
    from pathlib import Path

    from ._capture import Capture
    from ._coverage import Coverage
    from ._flow import GradientFlow
    from ._hook import Hook
    from ._monitor import Monitor
    from ._profile import Profile

__all__ = ["HookManager"]


class HookManager(Uncopied, ResearchManager):
    """Hooks on one model: look into it, change what flows through it, and leave no trace.

    Where a model holds its own manager, deep copies and pickles of the model hold None in that place.

    Args:
        model: any module; nothing is written on it.
        aliases: other names for hook points, with placeholders:
            `{"blocks.{i}.hook_resid_post": "transformer.h.{i}:output"}`.
        research_names: also give whatever attends the usual research names: `blocks.0.hook_resid_pre`,
            `blocks.0.attn.hook_z`, ... They are found by trying one forward pass, when one is asked for (`probe`).
        layers: path of the list of blocks that "layer 4" counts in, where it can't be told.
        name: of the manager: a new one of the same name on the same model takes the place of the old (a notebook cell
            run again), whose hooks come off.
        read_only: refuse every function but observers.
        capture_limit_mb: most MiB that all captures together hold; then the oldest state of all goes.
        tokenizer: makes tokens of text: `hooks.run_with_cache("Hello")`.

    Attributes:
        model: the model.
        store: a dict that all hooks share, as `hook.context.store`.

    Example:
        >>> with HookManager(model) as hooks:
        ...     hooks.add("blocks.*.mlp:output", lambda tensor, point: print(point.name, tensor.norm()))
        ...     model(x)
    """

    def run_with_hooks(
        self,
        *args: Any,
        hooks: Sequence[Any] = (),
        stop_at: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        missing: str = "raise",
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model once with hooks for this run only: `hooks=[("blocks.5.attn:output", fn), ...]`.

        They belong to the run's graph: hooks on gradients act when backward comes, also after this call, and all act
        again where activation checkpointing repeats the forward. They fire in the calling thread alone, and whatever
        happens the model is left as it was.

        Args:
            *args: of the model.
            hooks: (points, fn) pairs, as for `add`.
            stop_at: end the run at this point, and return what is there.
            start_at_layer: the first argument is the residual stream before this layer, and the run goes on from there.
            stop_at_layer: end the run before this layer (their number: after the last), and return the residual stream.
            missing: `"raise"` where one of the hooks did nothing in the run, or `"ignore"`. Of a pattern one point at
                least has to fire, of a list something of each part.
            model_kwargs: keyword arguments of the model that its forward does not name, or named as those here.
            **kwargs: other keyword arguments of the model.

        Raises:
            HookNeverFired: nothing fired of one that was asked for; with the reason.
            ConfigError: a keyword that would vanish in the `**kwargs` of the model's forward.
        """
        kwargs = model_kwargs_of(self, "run_with_hooks", kwargs, model_kwargs)
        args, kwargs = self._tokens(args, kwargs)
        part = LayerRun(self, args, kwargs, start_at_layer, stop_at_layer)
        part.refuse_skipped(self, hooks)
        stop_at = part.stop_at if stop_at is None else stop_at
        with self._inputs_at_hand(args, kwargs):
            hooks = [*part.hooks, *hooks]
            output = run_with_hooks(self, part.args, part.kwargs, hooks=hooks, stop_at=stop_at, missing=missing)
        return part.output(output)

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
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        pos_slice: Any = None,
        remove_batch_dim: bool = False,
        hooks: Sequence[Any] = (),
        missing: str = "raise",
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
            start_at_layer: as for `run_with_hooks`; what comes before is not kept.
            stop_at_layer: as for `run_with_hooks`.
            pos_slice: keep these positions only (of patterns and scores: of their queries): a number, list or slice.
            remove_batch_dim: keep tensors without their first dimension, which is 1.
            hooks: (points, fn) pairs that act in this run; what is kept is what they leave.
            missing: `"raise"` where something asked for was never reached, or `"ignore"`; what else never fired is in
                `cache.missing`, with the reason.
            model_kwargs: keyword arguments of the model that its forward does not name, or named as those here.
            **kwargs: other keyword arguments of the model.

        Returns:
            The output, and a `Cache`.

        Raises:
            HookNeverFired: as for `run_with_hooks`.
            ConfigError: as for `run_with_hooks`.
        """
        kwargs = model_kwargs_of(self, "run_with_cache", kwargs, model_kwargs)
        args, kwargs = self._tokens(args, kwargs)
        part = LayerRun(self, args, kwargs, start_at_layer, stop_at_layer)
        part.refuse_skipped(self, hooks)
        kept: dict[str, Any] = {"clone": clone, "detach": detach, "remove_batch_dim": remove_batch_dim, "part": part}
        options = CacheOptions(gradients=gradients, device=device, dtype=dtype, pos_slice=pos_slice, **kept)
        with self._inputs_at_hand(args, kwargs):
            return run_with_cache(self, part, options, points=points, stop_at=stop_at, hooks=hooks, missing=missing)

    def capture(  # noqa: PLR0913
        self,
        points: Any,
        *,
        inputs: bool = False,
        outputs: bool = True,
        gradients: bool = False,
        max_states: int | None = None,
        max_states_per_module: int | None = None,
        max_age: int | None = None,
        memory_limit_mb: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        clone: bool = True,
        cleanup_interval: int | None = None,
        every: int = 1,
        when: Callable[[Any], Any] | None = None,
        on_error: str = "disable",
        store: Any = None,
        id: str | None = None,  # noqa: A002
    ) -> Capture:
        """Keep what modules take and give, call by call, within bounds: `hooks.capture(4, inputs=True, max_states=16)`.

        Args:
            points: modules, as for `add`; a port named here (`"encoder.*:input"`, `"head:grad_output"`) counts unless
                several are asked for.
            inputs: keep what goes in.
            outputs: keep what comes out.
            gradients: keep the gradient of what comes out, in the same state, when backward brings it.
            max_states: most states held, over all modules together; then the oldest goes.
            max_states_per_module: most states held of each module.
            max_age: steps after which a state goes.
            memory_limit_mb: most MiB held; `HookManager(capture_limit_mb=...)` bounds all captures together.
            device: move states there.
            dtype: convert floating tensors.
            clone: copy, so that a later in-place operation does not change a state.
            cleanup_interval: after this many dropped states, give freed device memory back to the driver.
            every: only at steps that this divides.
            when: a function of the point: only where it holds.
            on_error: what a failure does (a full disk): `"disable"` (one warning, and the run goes on), `"warn"`,
                `"raise"`, `"close"`.
            store: folder, or `ActivationStore`: write states to disk, one file for each forward pass.
            id: of the hook; `hooks.captures[id]` is the capture.
        """
        from ._capture import CaptureOptions, capture

        options = CaptureOptions(
            max_states=max_states,
            max_states_per_module=max_states_per_module,
            max_age=max_age,
            memory_limit_mb=memory_limit_mb,
            device=device,
            dtype=dtype,
            clone=clone,
            cleanup_interval=cleanup_interval,
        )
        ports = [p for p, on in (("input", inputs), ("output", outputs), ("grad_output", gradients)) if on]
        hooked = {"every": every, "when": when, "on_error": on_error, "id": id}
        return capture(self, points, ports=ports, options=options, store=store, hooked=hooked)

    @property
    def captures(self) -> Mapping[str, Capture]:
        """The captures that somebody still holds, by the id of their hook."""
        return {capture.hook.id: capture for capture in list(self._captures)}

    def clear_captures(self, *ids: str) -> int:
        """Forget the states of these captures, or of all; return how many went."""
        known = self.captures
        for name in ids:
            if name not in known:
                raise UnknownNameError("capture", name, known)
        return sum(capture.clear() for name, capture in known.items() if not ids or name in ids)

    def monitor(
        self,
        points: Any = "*:output",
        *,
        metrics: Mapping[str, Callable[[Tensor], Any]] | None = None,
        history: int | None = None,
        **options: Any,
    ) -> Monitor:
        """Keep running statistics: mean, std, rms, absmax, share of zeros, non-finite count by point. See `Monitor`.

        Args:
            points: as for `add`.
            metrics: measures of one's own by name: `{"l1": lambda tensor: tensor.abs().mean()}`.
            history: of how many steps back the statistics are kept apart too: `monitor.over_time(name)`.
            **options: as for `add`.
        """
        from ._monitor import Monitor

        monitor = Monitor(metrics=metrics, history=history)
        monitor.hook = self.add(points, monitor, **options)
        return monitor

    def gradient_flow(self, points: Any = "*:grad_output", **options: Any) -> GradientFlow:
        """Watch how gradients grow or vanish on their way back: `with hooks.gradient_flow() as flow: ...`."""
        from ._flow import GradientFlow

        flow = GradientFlow()
        flow.hook = self.add(points, flow, **options)
        return flow

    def break_when(
        self, points: Any, condition: Any, *, action: Any = "raise", times: int | None = 1, **options: Any
    ) -> Hook:
        """Stop the first times that `condition(tensor, point)` holds.

        Args:
            points: as for `add`.
            condition: a function, or ready-made: `non_finite`, `exceeds(x)`, `dead`.
            action: `"raise"` a `HookBreak` with the tensor, point and step; `"debugger"`; or a function of the
                `HookBreak`.
            times: how often; None for every time.
            **options: as for `add`.

        Returns:
            The hook; `hook.fn.hit` (`hook.fn.hits`) is what was found, and `hook.reset()` arms it again.
        """
        from ._breakpoints import Break

        return self.add(points, Break(condition, action, times=times), **options)

    def parameters(self) -> list[Tensor]:
        """Return the parameters of all hook functions that are modules, for an optimizer: interventions that learn."""
        from ._trainable import trainable

        return [p for module in trainable(self.hooks).values() for p in module.parameters()]

    def save_interventions(self, path: str | Path) -> None:
        """Write the parameters of all hook functions that are modules to a safetensors file, by the hooks' ids."""
        from ._trainable import save_interventions

        save_interventions(self.hooks, path)

    def load_interventions(self, path: str | Path) -> list[str]:
        """Load what `save_interventions` wrote into the hooks of the same ids, and return these."""
        from ._trainable import load_interventions

        return load_interventions(self.hooks, path)

    def profile(self, points: Any = "*") -> Profile:
        """Time every module, forward and backward: `with hooks.profile() as profile: ...`. See `Profile`."""
        from ._profile import Profile

        return Profile(self, points)

    def coverage(self) -> Coverage:
        """Tell for each hook and point whether it fired and, if not, why."""
        from ._coverage import coverage

        return coverage(self)
