"""The core of `HookManager`: names, adding, removing, contexts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakMethod

from torch import Tensor, nn

from ..errors import ConfigError, UnknownNameError
from ..torchside import member
from ._aliases import expand_aliases
from ._functions import HookFunction, Observer
from ._hook import Hook, HookOptions
from ._managers import enter, tell_of_abandoned
from ._names import ModelNames
from ._patterns import Resolver
from ._points import PORTS, HookPoint
from ._registry import Registry
from ._research_names import ResearchNames
from ._runs import Runs
from ._silence import check_fired, check_missing

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._manager import HookManager

__all__ = ["BaseManager"]


def _present(model: nn.Module) -> list[int]:
    """Return what tells whether modules or parameters have come or gone: `model.modules()`, without its cost."""
    found: list[int] = []
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        found.append(id(module))
        found += map(id, (own.get("_parameters") or {}).values())
        waiting += (own.get("_modules") or {}).values()
    return found


class BaseManager:
    """What `HookManager` does with hooks in general. See there."""

    def __init__(
        self,
        model: nn.Module,
        *,
        aliases: Mapping[str, Any] | None = None,
        research_names: bool = True,
        layers: str | None = None,
        name: str | None = None,
        read_only: bool = False,
        capture_limit_mb: float | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"HookManager takes a torch.nn.Module. Got {type(model).__name__}.")
        self.model = model
        self.store: dict[str, Any] = {}
        self._aliases, self._research_names, self._layers = dict(aliases or {}), research_names, layers
        self._runs = Runs()
        self._registry = Registry(model, self._runs)
        self._registry.manager = weakref.ref(self)
        self._known: tuple[list[int], Resolver] | None = None
        self._at_hand: tuple[Sequence[Any], Mapping[str, Any]] | None = None
        self._closed = False
        self._on_close: list[WeakMethod[Callable[[], Any]]] = []
        self._resolver  # noqa: B018 - an alias that matches nothing is an error here, not later
        self.name, self.read_only, self.tokenizer = name, read_only, tokenizer
        self.capture_limit_mb = capture_limit_mb
        self._captures: weakref.WeakSet[Any] = weakref.WeakSet()
        enter(cast("HookManager", self))

    @property
    def _resolver(self) -> Resolver:
        """The names, looked up afresh when modules or parameters have come or gone."""
        present = _present(self.model)
        how = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        present.append(hash(how) if isinstance(how, str) else 0)
        if self._known is None or self._known[0] != present:
            names = ModelNames(self.model, layers=self._layers)
            researched = ResearchNames(names, self.model) if self._research_names else None
            self._registry.forget_idle()
            self._known = (present, Resolver(names, expand_aliases(names, self._aliases), researched))
        self._known[1].researched.at_hand = self._at_hand
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

    def probe(self, *args: Any, **kwargs: Any) -> list[str]:
        """Find the research names of a model by trying one forward pass with these inputs; return them.

        Models of torch's and Hugging Face's kinds are tried with made-up inputs when such a name is first asked for;
        others with those of a run that asks for one. The pass is made on a copy that shares the parameters, in eval
        mode: nobody's hooks see it, and buffers and random numbers stay as they are.

        Raises:
            ConfigError: the pass fails, or nothing attends in it.
        """
        researched = self._resolver.researched
        if not isinstance(researched, ResearchNames):
            raise ConfigError("this HookManager was made without research names.")
        researched.probe(args, kwargs)
        return [point.name for point in researched.names().values() if point.available]

    @contextmanager
    def _inputs_at_hand(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Within the context names may be found by a pass with these inputs."""
        self._at_hand = (args, kwargs)
        try:
            yield
        finally:
            self._at_hand = None
            if self._known is not None:
                self._known[1].researched.at_hand = None

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
            UnknownNameError: an option that a hook does not have.
        """
        hook = self._make(points, fn, port=port, id=id, **options)
        tell_of_abandoned(cast("HookManager", self), hook)
        self._registry.attach(hook)
        self._registry.warn_of_compiled(hook)
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
        if self.read_only and not (isinstance(fn, Observer) or getattr(fn, "is_reader", False)):
            raise ConfigError("this HookManager is read-only: it takes observers alone (`observe`, `monitor`, ...).")
        if port not in PORTS:
            raise UnknownNameError("port", port, PORTS, where="port")
        HookOptions.refuse_unknown(options)
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
    def temporary(
        self, *specs: Any, every_thread: bool = False, missing: str = "raise", **options: Any
    ) -> Iterator[list[Hook]]:
        """Hooks for the time of a `with` block: `with hooks.temporary(("blocks.5:output", fn)): ...`.

        Contexts nest. Leaving one, by whatever way, removes exactly its own hooks; others are not touched. What acted
        in a forward of the block belongs to its graph: it acts when checkpointing repeats that forward, and hooks on
        gradients act when backward comes, also after the block. Its hooks fire in the thread that opened it, so that
        two threads may each have theirs (`every_thread=True`: in all).

        Args:
            *specs: (points, fn) pairs, as for `add`.
            every_thread: fire in all threads.
            missing: `"raise"` at the end of the block where one of the hooks did nothing in it, or `"ignore"`.
            **options: as for `add`, for all of them.

        Raises:
            HookNeverFired: nothing fired of one that was asked for.
        """
        check_missing(missing)
        asked = self._add_all(specs, every_thread=every_thread, **options)
        added = [hook for _, hook in asked]
        try:
            yield added
            check_fired(cast("HookManager", self), [pair for pair in asked if pair[1].attached], missing=missing)
        except BaseException:
            self._registry.detach(added)
            raise
        self._registry.release(added)

    def _add_all(self, specs: Sequence[Any], *, every_thread: bool, **options: Any) -> list[tuple[Any, Hook]]:
        """Add hooks for a time; return (points, hook) of each."""
        asked: list[tuple[Any, Hook]] = []
        self._registry.forget_kept()
        try:
            for points, fn in specs:
                given = list(points) if isinstance(points, Iterator) else points
                hook = self._make(given, fn, **options)
                if not every_thread:
                    hook.bind_to_thread()
                self._registry.attach(hook)
                asked.append((given, hook))
        except BaseException:
            self._registry.detach(hook for _, hook in asked)
            raise
        return asked

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

    def hooks_at(self, points: Any = None, *, kind: type | None = None, permanent: bool | None = None) -> list[Hook]:
        """Return the hooks at any of the points (at all, where none are named), of a kind: `Observer`, `Intervention`.

        Args:
            points: as for `add`.
            kind: class of the function.
            permanent: only those that `remove_all` spares (True), or that it takes (False).
        """
        places = None if points is None else {p.place for p in self._resolver.resolve(points)}
        return [
            hook
            for hook in self.hooks
            if (places is None or any(p.place in places for p in hook.points))
            and (kind is None or isinstance(hook.fn, kind))
            and permanent in (None, hook.options.permanent)
        ]

    def _tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a run: of text tokens are made, of one row of tokens for a language model a batch."""
        text = args[0] if args else None
        if isinstance(text, Tensor) and text.ndim == 1 and not text.is_floating_point():
            batched = member(self.model, "get_input_embeddings") is not None
            return ((text[None], *args[1:]) if batched else args), kwargs
        is_text = isinstance(text, str) or (isinstance(text, list) and text and isinstance(text[0], str))
        if not is_text:
            return args, kwargs
        if self.tokenizer is None:
            raise ConfigError("text needs a tokenizer: HookManager(model, tokenizer=tokenizer).")
        made = self.tokenizer(text, return_tensors="pt", padding=isinstance(text, list))
        device = next((p.device for p in self.model.parameters()), None)
        return args[1:], {**{name: tensor.to(device) for name, tensor in dict(made).items()}, **kwargs}

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

    def _at_close(self, ending: Callable[[], Any]) -> None:
        """Call a method of something made here when the manager closes, if its user has kept it till then."""
        self._on_close = [known for known in self._on_close if known() is not None]
        self._on_close.append(WeakMethod(ending))

    def close(self) -> None:
        """Take everything off, permanent hooks too, and silence what lives on in old graphs. Twice is harmless."""
        self._closed = True
        while self._on_close:
            ending = self._on_close.pop()()
            if ending is not None:
                ending()
        self._registry.close()
        for listener in tuple(self._runs.listeners):
            self._registry.listen(listener, on=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"{type(self).__name__}({type(self.model).__name__}, {len(self)} hooks{state})"
