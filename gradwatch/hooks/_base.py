"""The core of `HookManager`: names, adding, removing, contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..errors import ConfigError, UnknownNameError
from ._aliases import expand_aliases
from ._functions import HookFunction, Observer
from ._hook import Hook, HookOptions
from ._names import ModelNames
from ._patterns import Resolver
from ._points import PORTS, HookPoint
from ._registry import Registry
from ._runs import Runs

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._manager import HookManager

__all__ = ["BaseManager"]


class BaseManager:
    """What `HookManager` does with hooks in general. See there."""

    def __init__(
        self,
        model: nn.Module,
        *,
        aliases: Mapping[str, Any] | None = None,
        research_names: bool = True,
        layers: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"HookManager takes a torch.nn.Module. Got {type(model).__name__}.")
        self.model = model
        self.store: dict[str, Any] = {}
        self._aliases, self._research_names, self._layers = dict(aliases or {}), research_names, layers
        self._runs = Runs()
        self._registry = Registry(model, self._runs)
        self._known: tuple[list[int], Resolver] | None = None
        self._closed = False
        self._on_close: list[Callable[[], Any]] = []
        self._resolver  # noqa: B018 - an alias that matches nothing is an error here, not later

    @property
    def _resolver(self) -> Resolver:
        """The names, looked up afresh when modules or parameters have come or gone."""
        present = [*map(id, self.model.modules()), *map(id, self.model.parameters())]
        if self._known is None or self._known[0] != present:
            names = ModelNames(self.model, layers=self._layers)
            aliases = expand_aliases(names, self._aliases, research_names=self._research_names)
            self._known = (present, Resolver(names, aliases))
        return self._known[1]

    def points(self, pattern: Any = "*", *, port: str | None = None) -> list[HookPoint]:
        """Return the hook points that a pattern means: all ports unless one is named.

        Each is its name, with `aliases` and `other_names`. Aliases that the pattern matches come last, also those that
        this model can't offer (`available` is False, and `reason` says why).
        """
        resolver = self._resolver
        if isinstance(pattern, str) and ":" not in pattern and port is None:
            found = [p for one in PORTS for p in resolver.matching(pattern, one)]
            found += resolver.matching_aliases(pattern)
            return found or resolver.resolve(pattern)
        return resolver.resolve(pattern, port=port or "output")

    @property
    def layers(self) -> list[str]:
        """Paths of what "layer 0", "layer 1", ... mean."""
        return ModelNames(self.model, layers=self._layers).layer_paths()

    @property
    def hooks(self) -> list[Hook]:
        """The hooks on the model, in the order they were added."""
        return list(self._registry.hooks.values())

    def __getitem__(self, hook_id: str) -> Hook:
        if hook_id not in self._registry.hooks:
            raise UnknownNameError("hook", hook_id, self._registry.hooks)
        return self._registry.hooks[hook_id]

    def __contains__(self, hook_id: str) -> bool:
        return hook_id in self._registry.hooks

    def __len__(self) -> int:
        return len(self._registry.hooks)

    def add(
        self,
        points: Any,
        fn: HookFunction,
        *,
        port: str = "output",
        id: str | None = None,  # noqa: A002
        **options: Any,
    ) -> Hook:
        """Attach a function at every point that `points` means, or, when anything is wrong, at none.

        Args:
            points: `"PATH:PORT"` with globs (`*` crosses dots), `"re:..."`, an index or `"layer 4"`, a class, a module
                or parameter, a predicate over hook points, `(target, port)`, or a list of these.
            fn: `fn(tensor, point)`. None leaves the tensor; a tensor of the same shape, dtype and device replaces it.
                An `Observer` can't change anything; an `Intervention` may.
            port: where `points` names none.
            id: unique name; else one is made up.
            **options: `prepend` (before hooks of its priority that are there already), `priority` (the highest runs
                first), `permanent` (`remove_all` spares it), `every` (steps), `when` (a function of the point), `once`
                (at each point), `on_error` (`"raise"`, `"disable"`, `"close"`), `raw` (the function gets torch's own
                arguments, a `RawCall`), `recompute` (also on recomputation by checkpointing), `leaf` (one tensor of a
                nested output).

        Returns:
            The hook; `hook.remove()` takes it off.

        Raises:
            UnknownPathError: nothing matches.
            UnavailablePointError: the model can't offer the point.
            ConfigError: an option that can't be.
        """
        hook = self._make(points, fn, port=port, id=id, **options)
        self._registry.attach(hook)
        if hasattr(fn, "context"):
            fn.context = hook.context
        return hook

    def _make(
        self,
        points: Any,
        fn: HookFunction,
        *,
        port: str = "output",
        id: str | None = None,  # noqa: A002
        **options: Any,
    ) -> Hook:
        if self._closed:
            raise ConfigError("this HookManager is closed: make a new one.")
        if not callable(fn):
            raise ConfigError(f"a hook function is called with (tensor, point). Got {fn!r}.")
        checked = HookOptions(**options)
        found = self._resolver.resolve(points, port=port)
        frozen = [p for p in found if p.is_parameter and not p.target.requires_grad]
        if frozen and len(frozen) == len(found):
            raise ConfigError(
                f"{frozen[0].path!r} does not require a gradient: no hook at {frozen[0].place!r} can fire."
            )
        if checked.raw and any(p.port in ("grad_output", "grad_at_input", "grad", "accumulated_grad") for p in found):
            raise ConfigError(
                "`raw=True` hands over a module's arguments: it is for the ports input, output, grad_input."
            )
        return Hook(cast("HookManager", self), self._registry.new_id(id), fn, found, checked)

    def observe(self, points: Any, fn: HookFunction, **options: Any) -> Hook:
        """Attach a function that only looks, whatever it returns. As `add` with an `Observer`."""
        return self.add(points, fn if isinstance(fn, Observer) else Observer(fn), **options)

    @contextmanager
    def temporary(self, *specs: Any, every_thread: bool = False, **options: Any) -> Iterator[list[Hook]]:
        """Hooks for the time of a `with` block: `with hooks.temporary(("blocks.5:output", fn)): ...`.

        Contexts nest. Leaving one, by whatever way, removes exactly its own hooks; others are not touched. Its hooks
        fire in the thread that opened it, so that two threads may each have theirs (`every_thread=True`: in all).

        Args:
            *specs: (points, fn) pairs, as for `add`.
            every_thread: fire in all threads.
            **options: as for `add`, for all of them.
        """
        added = self._add_all(specs, every_thread=every_thread, **options)
        try:
            yield added
        finally:
            self._registry.detach(added)

    def _add_all(self, specs: Sequence[Any], *, every_thread: bool, **options: Any) -> list[Hook]:
        added: list[Hook] = []
        try:
            for points, fn in specs:
                hook = self._make(points, fn, **options)
                if not every_thread:
                    hook.bind_to_thread()
                self._registry.attach(hook)
                added.append(hook)
        except BaseException:
            self._registry.detach(added)
            raise
        return added

    @contextmanager
    def disabled(self, *ids: str) -> Iterator[None]:
        """Some hooks off (all, when none is named) within the context; afterwards each as it was."""
        chosen = [self[i] for i in ids] if ids else self.hooks
        were_on = [hook for hook in chosen if hook.is_enabled]
        for hook in were_on:
            hook.disable()
        try:
            yield
        finally:
            for hook in were_on:
                hook.enable()

    def enable(self, *ids: str) -> None:
        """Enable the hooks named, or all."""
        for hook in [self[i] for i in ids] if ids else self.hooks:
            hook.enable()

    def disable(self, *ids: str) -> None:
        """Disable the hooks named, or all."""
        for hook in [self[i] for i in ids] if ids else self.hooks:
            hook.disable()

    def remove(self, hook: Hook | str) -> None:
        """Take one hook off, given itself or its id."""
        (self[hook] if isinstance(hook, str) else hook).remove()

    def remove_all(self, *, including_permanent: bool = False) -> int:
        """Take this manager's hooks off, and nobody else's; permanent ones stay unless included.

        Returns:
            How many were taken off.
        """
        going = [hook for hook in self.hooks if including_permanent or not hook.options.permanent]
        self._registry.detach(going)
        return len(going)

    @property
    def step(self) -> int:
        """Forward passes of the model begun, less one; or what it was set to, for those who count otherwise."""
        return self._runs.last_step

    @step.setter
    def step(self, step: int) -> None:
        self._runs.set_step(step)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Take everything off, permanent hooks too, and silence what lives on in old graphs. Twice is harmless."""
        self._closed = True
        while self._on_close:
            self._on_close.pop()()
        self.remove_all(including_permanent=True)
        self._registry.silence()
        for listener in tuple(self._runs.listeners):
            self._registry.listen(listener, on=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refresh(self, hook: Hook) -> None:
        self._registry.refresh(hook)

    def _remove(self, hooks: list[Hook]) -> None:
        self._registry.detach(hooks)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"{type(self).__name__}({type(self.model).__name__}, {len(self)} hooks{state})"
