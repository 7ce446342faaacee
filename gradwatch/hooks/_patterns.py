"""From what a user points at (glob, regular expression, class, index, ...) to hook points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import ConfigError, UnavailablePointError, UnknownNameError, UnknownPathError
from ._names import ModelNames
from ._points import ATTENTION_PORTS, GRADIENT_OF, MODULE_PORTS, PARAMETER_PORTS, PORTS, HookPoint

__all__ = ["ALL_PORTS", "Researched", "Resolver", "gradient_of"]

ALL_PORTS = PORTS + ATTENTION_PORTS
_SCRIPTED = "it is a ScriptModule, which torch takes no hooks on: hook the module around it"
_UNINITIALISED = "the parameter is not initialised yet (a lazy module): run the model once before"


class Researched:
    """Names that are looked for only when somebody asks for one; here there are none.

    Attributes:
        at_hand: what a run that asks has to offer for a pass of trial: arguments, by place and by name.
    """

    at_hand: tuple[Sequence[Any], Mapping[str, Any]] | None = None

    def names(self, pattern: str = "") -> Mapping[str, HookPoint]:
        """Return name -> hook point, unavailable ones too; `pattern` is what was asked for."""
        return {}

    def may_mean(self, pattern: str) -> bool:
        """Return whether a pattern could match one of the names."""
        return False

    def why_none(self) -> str:
        """Return why the model has none of the names; empty where it has some, or nobody looked."""
        return ""

    def attending(self) -> set[str]:
        """Return the paths of modules that are known to attend."""
        return set()


class Resolver:
    """Finds hook points by what a user points at.

    Args:
        names: of the model.
        given: alias -> hook point, unavailable ones included.
        researched: further aliases, found when they are needed.
    """

    def __init__(self, names: ModelNames, given: Mapping[str, HookPoint], researched: Researched | None = None) -> None:
        self.names = names
        self.given = given
        self.researched = researched or Researched()
        self._matched: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, str]]] = {}

    @property
    def aliases(self) -> Mapping[str, HookPoint]:
        """All aliases, unavailable ones included."""
        found = {**self.researched.names(), **self.given}
        for point in found.values():
            point.named_by = self
        return found

    def aliases_of(self, path: str, port: str) -> tuple[str, ...]:
        """Return the other names of what is at a place."""
        return tuple(name for name, p in self.aliases.items() if p.available and (p.path, p.port) == (path, port))

    def _candidates(self, pattern: str, *, wide: bool = False) -> Mapping[str, HookPoint]:
        if not (wide or self.researched.may_mean(pattern)):
            return self.given
        self.researched.names(pattern)
        return self.aliases

    def point(self, path: str, port: str) -> HookPoint:
        """Return the hook point of a first name; not available where torch takes no hook there."""
        table: Mapping[str, Any] = self.names.parameters if port in PARAMETER_PORTS else self.names.modules
        found = HookPoint(path, port, table[path])
        found.named_by = self
        if path in self.names.other_names:
            found.other_names = self.names.other_names[path]
        if port == "peak":
            found.writing = "refuse"
        if port in PARAMETER_PORTS:
            found.reason = _UNINITIALISED if isinstance(table[path], nn.UninitializedParameter) else ""
        elif path in self.names.refusing:
            found.reason = _SCRIPTED
        return found

    def matching(self, pattern: str, port: str) -> list[HookPoint]:
        """Return the points of a port whose path fits a glob; maybe none."""
        exact = self._exact(pattern, port)
        return exact or self._named(lambda name: fnmatchcase(name, pattern), port)

    def matching_aliases(self, pattern: str) -> list[HookPoint]:
        """Return the aliases that fit a glob, unavailable ones too; maybe none."""
        known = self._candidates(pattern, wide=pattern == "*")
        return [point for alias, point in known.items() if alias == pattern or fnmatchcase(alias, pattern)]

    def resolve(self, target: Any, *, port: str = "output", ports: Iterable[str] = ALL_PORTS) -> list[HookPoint]:
        """Return the hook points that `target` means, each once, in model order of its kind.

        Args:
            target: `PATH:PORT` with globs, `re:...`, "layer 4", an index, a class, a module or parameter, a predicate
                over hook points, (target, port), or a list of these.
            port: where the target names none.
            ports: those that may be asked for here.

        Raises:
            UnknownPathError: it matches nothing; with the nearest names.
            UnknownNameError: the port is none of `ports`.
            UnavailablePointError: the name is known, but this model can't offer it.
        """
        found = {self._key(p): p for p in self._resolve(target, port, tuple(ports))}
        if not found:
            raise self._unknown(target, port)
        available = [p for p in found.values() if p.available]
        if not available:
            first = next(iter(found.values()))
            raise UnavailablePointError(first.name, first.reason)
        return available

    @staticmethod
    def _key(point: HookPoint) -> tuple[Any, ...]:
        return (point.path, point.port, point.view, point.leaf, point.reason and point.name)

    def _resolve(self, target: Any, port: str, ports: tuple[str, ...]) -> list[HookPoint]:
        if isinstance(target, HookPoint):
            return [target]
        if isinstance(target, str):
            return self._from_text(target, port, ports)
        if isinstance(target, bool):
            raise ConfigError(f"a hook point is named by a string, index, class, module or predicate. Got {target!r}.")
        if isinstance(target, int):
            return [self._layer(target, port)]
        if isinstance(target, (nn.Module, nn.Parameter)):
            is_parameter = isinstance(target, nn.Parameter)
            port = "grad" if is_parameter and port not in PARAMETER_PORTS else port
            return [self.point(self.names.path_of(target), port)]
        if isinstance(target, type):
            return [self.point(path, port) for path, m in self.names.modules.items() if isinstance(m, target)]
        if callable(target):
            return self._from_predicate(target, port)
        if isinstance(target, tuple) and len(target) == 2 and target[1] in ALL_PORTS:
            return self._resolve(target[0], target[1], ports)
        if isinstance(target, Iterable):
            return [p for part in target for p in self.resolve(part, port=port, ports=ports)]
        raise ConfigError(f"a hook point is named by a string, index, class, module or predicate. Got {target!r}.")

    def _from_predicate(self, predicate: Callable[[HookPoint], Any], port: str) -> list[HookPoint]:
        table = self.names.parameters if port in PARAMETER_PORTS else self.names.modules
        found = [point for path in table if predicate(point := self.point(path, port))]
        # None of the first names: one of the others may be meant, as in `lambda name: name.endswith("hook_z")`.
        return found or [point for point in self.aliases.values() if point.available and predicate(point)]

    def _layer(self, index: int, port: str) -> HookPoint:
        paths = self.names.layer_paths()
        if not -len(paths) <= index < len(paths):
            raise UnknownPathError(f"layer {index}", paths, model_name=self.names.model_name, kind="layer")
        return self.point(paths[index], port)

    def _from_text(self, text: str, port: str, ports: tuple[str, ...]) -> list[HookPoint]:
        if text.startswith("re:"):
            return self._from_expression(re.compile(text[3:]), port, ports)
        pattern, colon, named = text.rpartition(":")
        if named == "grad_output" and pattern.rpartition(":")[2] in ATTENTION_PORTS:
            return [gradient_of(point) for point in self._from_text(pattern, port, ports)]
        if colon and named not in ports and text in dict(self.names.spellings()):
            colon = ""  # a path may hold one
        if not colon:
            pattern, wanted = text, [port]
        else:
            wanted = [p for p in ports if p == named or (fnmatchcase(p, named) and p not in ATTENTION_PORTS)]
            if not wanted:
                raise UnknownNameError("port", named, ports, where=text)
        if layer := re.fullmatch(r"layer (-?\d+)", pattern):
            return [self._layer(int(layer.group(1)), p) for p in wanted]
        found = [p for one in wanted for p in self._exact(pattern, one)]
        asked = wanted if colon else None
        found += self._aliased(lambda name: name == pattern, asked, self._candidates(pattern))
        if found:  # exact names first: a path may hold brackets
            return found
        attending = self.researched.attending() if set(wanted) & set(ATTENTION_PORTS) else set()
        for one in wanted:
            named_here = self._named(lambda name: fnmatchcase(name, pattern), one)
            found += [p for p in named_here if one not in ATTENTION_PORTS or p.path in attending]
        known = self._candidates(pattern)
        found += self._aliased(lambda name: fnmatchcase(name, pattern), asked, known)
        return found or self._aliased(lambda name: fnmatchcase(name, pattern), asked, self.aliases)

    def _exact(self, name: str, port: str) -> list[HookPoint]:
        path = self.names.first_name(name, parameters=port in PARAMETER_PORTS)
        return [] if path is None else [self.point(path, port)]

    def _named(self, matches: Callable[[str], bool], port: str) -> list[HookPoint]:
        spellings = self.names.spellings(parameters=port in PARAMETER_PORTS)
        return [self.point(path, port) for path in dict.fromkeys(p for name, p in spellings if matches(name))]

    def _aliased(
        self, matches: Callable[[str], bool], ports: list[str] | None, known: Mapping[str, HookPoint]
    ) -> list[HookPoint]:
        found = []
        for alias, point in known.items():
            if not matches(alias):
                continue
            if ports is None or point.port in ports or not point.available:
                found.append(point)
            elif GRADIENT_OF.get(point.port) in ports or "grad_output" in ports:
                found.append(gradient_of(point))
        return found

    def _from_expression(self, pattern: re.Pattern[str], port: str, ports: tuple[str, ...]) -> list[HookPoint]:
        asked = pattern.pattern, port, ports
        if asked not in self._matched:
            self._matched[asked] = [
                (path, one)
                for one in ports
                if one not in ATTENTION_PORTS
                for name, path in self.names.spellings(parameters=one in PARAMETER_PORTS)
                if pattern.fullmatch(f"{name}:{one}") or (one == port and pattern.fullmatch(name))
            ]
        found = [self.point(path, one) for path, one in self._matched[asked]]
        known = self._candidates(pattern.pattern, wide=not found)
        return found + self._aliased(lambda name: pattern.fullmatch(name) is not None, None, known)

    def _unknown(self, target: Any, port: str) -> UnknownPathError:
        text = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
        _, colon, named = str(text).rpartition(":")
        shown = named if colon and named in PORTS else port
        both = [
            *(f"{path}:{port}" for path in self.names.modules for port in ([shown] if shown in MODULE_PORTS else []))
        ]
        both += [f"{path}:{shown if shown in PARAMETER_PORTS else 'grad'}" for path in self.names.parameters]
        both += [alias for alias, point in self.aliases.items() if point.available]
        reason = self.researched.why_none() if "hook_" in str(text) else ""
        note = f" It has no research names: {reason}." if reason else ""
        return UnknownPathError(text, both, model_name=self.names.model_name, kind="hook point", note=note)


def gradient_of(point: HookPoint) -> HookPoint:
    """Return the point of the gradient of an alias's tensor: the total over all its consumers."""
    port = GRADIENT_OF.get(point.port, point.port)
    found = HookPoint(point.path, port, point.target, name=f"{point.name}:grad_output")
    found.view, found.leaf, found.other_names, found.heads = point.view, point.leaf, point.other_names, point.heads
    return found
