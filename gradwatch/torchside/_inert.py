"""Hooks that belong to an owner: they hold it weakly, come off when it is gone, and are nothing on copies."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from types import MethodType
from typing import Any

import torch

from ._scripted import keep_out_of_scripts
from ._untraced import untraced

__all__ = ["MethodHook", "OwnedHook", "StepHook", "WeakHook", "is_owned", "weakly"]

_NOTHING = nullcontext().__exit__
"""What a hook becomes in a pickle: the standard library's own way to take any arguments and return None. A class of
ours would make the file of a saved model unreadable where gradwatch is not installed."""


class OwnedHook:
    """A hook of ours on a module, a parameter or an optimizer of the user's; its kinds say what a call does.

    The owner is held weakly: a model must not keep alive, or at work, a watch that the user has let go of (a notebook
    cell run again). When it is gone the hook takes itself off. Deep copies of what it hangs on (EMA, SWA) carry nothing
    of it; in pickles, which keep every hook, a function of the standard library that does nothing stands for it.
    """

    __slots__ = ("__weakref__", "_handle", "_owner", "_place")
    # A tensor's hooks are not pickled, and torch warns of it, unless they say that they know.
    __torch_unserializable__ = True

    def __init__(self, owner: Any) -> None:
        self._owner: weakref.ref[Any] = weakref.ref(owner)
        self._handle: Any = None
        self._place: Any = None

    def hang(self, register: Callable[..., Any], **options: Any) -> Any:
        """Register the hook, `hook.hang(module.register_forward_hook, with_kwargs=True)`; return torch's handle."""
        handle = self._handle = register(self._called(), **options)
        if options.get("with_kwargs") or options.get("always_call"):
            _number_apart(handle, first=bool(options.get("prepend")))
        place = getattr(register, "__self__", None)
        if isinstance(place, torch.nn.Module):
            keep_out_of_scripts(is_owned)
        self._place = None if place is None else weakref.ref(place)
        owner = self._owner()
        if owner is not None:
            self._owner = weakref.ref(owner, partial(_abandoned, self._remover(handle)))
        return handle

    def _remover(self, handle: Any) -> Callable[[], Any]:
        """Return what takes it off by torch's handle when its owner is gone, and does not keep it."""
        remove: Callable[[], Any] = handle.remove
        return remove

    def _called(self) -> Any:
        """Return what torch calls."""
        return self

    def take_off(self) -> None:
        """Take the hook off, where it hangs. May be called twice."""
        if self._handle is not None:
            self._handle.remove()
        owner = self._owner()
        if owner is not None:  # whose end is no concern of it any more
            self._owner = weakref.ref(owner)

    def __copy__(self) -> Any:
        return _NOTHING

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        place = None if self._place is None else self._place()
        copied = None if place is None else memo.get(id(place))
        if copied is not None:
            memo.setdefault(_Sweep, _Sweep()).places.append((copied, self._handle.id))
        return _NOTHING

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class WeakHook(OwnedHook):
    """Calls a function with its owner, what it was given, and torch's arguments, while there is an owner."""

    __slots__ = ("_fewest", "_function", "_given", "_kept")

    def __init__(self, owner: Any, function: Callable[..., Any], *given: Any) -> None:
        super().__init__(owner)
        self._function, self._given = function, given
        self._kept: Any = None
        self._fewest = 0

    def hang(self, register: Callable[..., Any], **options: Any) -> Any:
        if options.get("with_kwargs"):
            self._fewest = 3 if "pre_hook" in register.__name__ else 4
        return super().hang(register, **options)

    @classmethod
    def of(cls, method: Any, *, keeps_owner: bool = False) -> WeakHook:
        """Return the hook that calls a bound method; one that keeps its owner stays until its handle is removed."""
        hook = cls(method.__self__, method.__func__)
        hook._kept = method.__self__ if keeps_owner else None
        return hook

    @untraced
    def __call__(self, *args: Any) -> Any:
        if len(args) < self._fewest:
            # Taken off in the midst of torch's walk, which calls it all the same and knows no more that it takes
            # keyword arguments; or, by another thread, not yet all on.
            return None
        owner = self._owner()
        if owner is None:
            self.take_off()
            return None
        return self._function(owner, *self._given, *args)


class StepHook(WeakHook):
    """A `WeakHook` on the steps of an optimizer. Its `hang` returns itself, to be taken off with `remove`.

    Torch goes through these hooks as they lie: where one of them vanishes meanwhile, the user's step ends with an
    error. One that is taken off there (a watch closed by somebody's hook) does nothing from then on, and goes when it
    is called next and no other comes behind it.
    """

    __slots__ = ()

    def hang(self, register: Callable[..., Any], **options: Any) -> Any:
        super().hang(register, **options)
        return self

    def _remover(self, handle: Any) -> Callable[[], Any]:
        return partial(_remove_step_hook, handle)

    def take_off(self) -> None:
        """Take the hook off, or make it do nothing. May be called twice."""
        self._owner = _nobody  # type: ignore[assignment]
        if self._handle is not None:
            _remove_step_hook(self._handle)

    remove = take_off

    @untraced
    def __call__(self, *args: Any) -> Any:
        if self._owner() is None:
            hooks = self._handle.hooks_dict_ref()
            if hooks and next(reversed(hooks)) == self._handle.id:  # whoever goes through them is at the last
                self._handle.remove()
            return None
        return super().__call__(*args)


class MethodHook(OwnedHook):
    """A hook that torch calls by its method: Python enters a method without leaving its loop, an object through C.

    Saves a fifth of what a hook costs that does little else. Where the hook is copied, a method is made anew of its
    function and of what the copy of its object is: the kinds give `inert()`, an object that this function finds nothing
    to do for. A pickle names the method of what stands for the object, which any callable has.
    """

    __slots__ = ()

    def _called(self) -> Any:
        return getattr(self, "__call__")  # noqa: B004, B009 - the bound method

    def __copy__(self) -> Any:
        return self.inert()

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        super().__deepcopy__(memo)
        return self.inert()

    def inert(self) -> Any:
        """Return what stands for it on a copy."""
        raise NotImplementedError


def is_owned(hook: Any) -> bool:
    """Return whether what torch calls is a hook of ours."""
    # Anything may be a hook: one of somebody else's is asked for nothing.
    return isinstance(hook.__self__ if type(hook) is MethodType else hook, OwnedHook)


def weakly(method: Any, otherwise: Any = None) -> Callable[..., Any]:
    """Return a bound method as a function that does not keep its object; without one it returns `otherwise`.

    What hands such a callable down to its own parts is gone as soon as nobody holds it, and not only when the cycle is
    found.
    """
    # `weakref.WeakMethod` does the same in Python, at three times the price.
    reference, function = weakref.ref(method.__self__), method.__func__

    @untraced
    def call(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        return otherwise if owner is None else function(owner, *args, **kwargs)

    return call


class _Sweep:
    """Takes what stands for our hooks out of a deep copy again, when the copying is over and its memo is let go."""

    def __init__(self) -> None:
        self.places: list[tuple[Any, int]] = []

    def __del__(self) -> None:
        for copied, key in self.places:
            for name, hooks in tuple(vars(copied).items()):
                if "hook" in name and isinstance(hooks, dict):
                    hooks.pop(key, None)


class _Numbers:
    """Gives out numbers below 0, each once; a process that was forked off begins elsewhere."""

    def __init__(self) -> None:
        self._process, self._next, self._left = -1, 0, 0

    def take(self) -> int:
        """Return the next number. Asking the system for each takes longer than to register a hook."""
        if not self._left or self._process != os.getpid():
            self._process, self._left = os.getpid(), _AT_ONCE
            self._next = -1 - (int.from_bytes(os.urandom(8), "little") >> 2)
        self._left -= 1
        self._next -= 1
        return self._next


_AT_ONCE = 1 << 16
_numbers = _Numbers()


def _number_apart(handle: Any, *, first: bool) -> None:
    """Give a hook a number that torch gives to nobody.

    Beside the hooks a module notes by number which of them take keyword arguments. Numbers begin at 0 in every process:
    in one that loads the saved model, another's hook would get the number, and arguments that it does not take.
    """
    number = _numbers.take()
    for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        hooks = reference()
        if hooks is not None and handle.id in hooks:
            hooks[number] = hooks.pop(handle.id)
            if first and hasattr(hooks, "move_to_end"):
                hooks.move_to_end(number, last=False)
    handle.id = number


def _nobody() -> None:
    """Return the owner of a hook that has none any more."""


def _step_code() -> Any:
    """Return the code of torch's that calls an optimizer's step and the hooks around it; None where it is another."""
    with suppress(AttributeError, TypeError):
        return torch.optim.Optimizer.profile_hook_step(_nobody).__code__
    return None


_STEP = _step_code()


def _goes_through_hooks() -> bool:
    """Return whether an optimizer is at the hooks around its step in this thread: in them, and not in the step."""
    frame: Any = sys._getframe(1)
    code = None  # of what this frame has called
    while frame is not None:
        if frame.f_code is _STEP:
            step = getattr(frame.f_locals.get("func"), "__code__", None)
            if code is not step:
                return True
        code, frame = frame.f_code, frame.f_back
    return False


def _remove_step_hook(handle: Any) -> None:
    if not _goes_through_hooks():
        handle.remove()


def _abandoned(remove: Callable[[], Any], _: Any) -> None:
    # Called wherever the collector finds the owner: in the midst of torch's walk through a module's hooks too, which
    # they must not vanish under. Those take themselves off when they are called next.
    try:
        frame: Any = sys._getframe(1)
    except (AttributeError, ValueError):  # no such function, or nobody called: the interpreter is ending
        frame = None
    if frame is None or not str(frame.f_globals.get("__name__", "")).startswith("torch."):
        remove()
