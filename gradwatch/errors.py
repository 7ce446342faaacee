"""Every exception and warning that gradwatch raises on purpose."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = [
    "ConfigError",
    "GradwatchError",
    "GradwatchWarning",
    "HookBreak",
    "HookError",
    "HookNeverFired",
    "MissingExtraError",
    "RunFormatError",
    "TrainingStopped",
    "UnavailablePointError",
    "UnknownNameError",
    "UnknownPathError",
    "UnreadableError",
    "suggest",
]


def suggest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return "Did you mean 'a' or 'b'?" for the known names nearest to `name`, else `otherwise`."""
    known = sorted({k for k in known if k})
    near = [k for k in known if plain_name(k) == plain_name(name)] or get_close_matches(name, known, n=3)
    near = near or [k for k in known if name and name.lower() in k.lower()][:3]
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def plain_name(name: str) -> str:
    """Return what is left of a name whichever way it is spelt: "clipbynorm" of "ClipByNorm" and "clip-by-norm"."""
    return "".join(filter(str.isalnum, name)).lower()


class GradwatchError(Exception):
    """Base of all gradwatch errors.

    They cross processes whatever their constructors take; an attribute that can't be pickled arrives as its text.
    """

    def __reduce__(self) -> Any:
        return _made_again, (type(self), self.args, {name: _portable(value) for name, value in vars(self).items()})


def _made_again(cls: type[GradwatchError], args: tuple[Any, ...], state: dict[str, Any]) -> GradwatchError:
    error = cls.__new__(cls, *args)
    vars(error).update(state)
    return error


def _portable(value: Any) -> Any:
    try:
        pickle.dumps(value)
    except Exception:
        return repr(value)
    return value


class GradwatchWarning(UserWarning):
    """Category of all warnings that gradwatch gives."""


class ConfigError(GradwatchError, ValueError):
    """A setting that can't be: says which, what was given, and what is allowed."""


class UnknownNameError(ConfigError, LookupError):
    """A name that is not one of the known ones.

    Attributes:
        name: the name asked for.
        known: the names there are.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], *, where: str = "") -> None:
        self.name = str(name)
        self.known = sorted(known)
        hint = suggest(self.name, self.known, otherwise=f"Known: {', '.join(self.known) or 'none'}.")
        super().__init__(f"{where + ': ' if where else ''}there is no {kind} {self.name!r}. {hint}")


class UnknownPathError(ConfigError, LookupError):
    """A path or pattern that matches nothing in the model.

    Attributes:
        path: the path or pattern asked for.
        known: the paths the model has.
    """

    def __init__(
        self, path: object, known: Iterable[str], *, model_name: str, kind: str = "path", note: str = ""
    ) -> None:
        self.path = str(path)
        self.known = [k for k in known if k]
        examples = ", ".join(repr(k) for k in self.known[:3])
        hint = suggest(self.path, self.known, otherwise=f"Known are, for example, {examples}." if examples else "")
        super().__init__(
            f"{model_name} has no {kind} that matches {self.path!r} ({len(self.known)} known). {hint}{note}"
        )


class UnreadableError(GradwatchError, TypeError):
    """A tensor of a kind that can't be read, or not in the way asked for: only its own numbers are missing."""


class HookError(GradwatchError, RuntimeError):
    """A hook function raised. The original exception is `__cause__`.

    Attributes:
        hook_id: which hook.
        point: name of the hook point, `PATH:PORT`.
        phase: "forward" or "backward".
    """

    def __init__(self, hook_id: str, point: str, phase: str, cause: BaseException) -> None:
        self.hook_id = hook_id
        self.point = point
        self.phase = phase
        super().__init__(f"hook {hook_id!r} at {point!r} raised in {phase}: {type(cause).__name__}: {cause}")


class UnavailablePointError(ConfigError, LookupError):
    """A hook point that has a name, but that this model can't offer.

    Attributes:
        point: the name asked for.
        reason: why the model can't offer it.
    """

    def __init__(self, point: str, reason: str) -> None:
        self.point = point
        self.reason = reason
        super().__init__(f"hook point {point!r} is not available: {reason}.")


class HookBreak(GradwatchError, RuntimeError):  # noqa: N818 - an outcome that was asked for
    """The condition of `HookManager.break_when` held for the first time.

    Attributes:
        tensor: what the condition was given.
        point: where, with the step and the call.
        hook_id: which hook asked.
    """

    def __init__(self, hook_id: str, point: object, tensor: object, what: str) -> None:
        self.hook_id = hook_id
        self.point = point
        self.tensor = tensor
        step, name = getattr(point, "step", "?"), getattr(point, "name", point)
        super().__init__(f"hook {hook_id!r}: {what} at {str(name)!r}, step {step}, call {getattr(point, 'call', '?')}")


class HookNeverFired(GradwatchError, RuntimeError):  # noqa: N818 - reads as what happened
    """A hook that was asked for in a run did nothing there: its point was never reached.

    Attributes:
        hook_id: which hook.
        point: name of the hook point, or the pattern, of which nothing fired.
        kind: as `PointCoverage.kind`: "never called", "compiled away", "no gradient", ...
        reason: the same as a clause.
    """

    def __init__(self, hook_id: str, point: str, kind: str, reason: str) -> None:
        self.hook_id = hook_id
        self.point = point
        self.kind = kind
        self.reason = reason
        super().__init__(
            f"hook {hook_id!r} at {point!r} never fired in this run: {reason}. missing='ignore' lets it pass."
        )


class MissingExtraError(GradwatchError, ImportError):
    """A package that only this feature needs is not installed: names the extra to install."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs the package {package!r}: pip install 'gradwatch[{extra}]'")


class RunFormatError(GradwatchError, ValueError):
    """A run folder or log that can't be read: says which file and what is wrong with it."""


class TrainingStopped(GradwatchError, RuntimeError):  # noqa: N818 - an outcome that was asked for, as StopIteration is
    """gradwatch was asked to stop the training, and the trainer has no other way to be stopped."""
