"""Presets, rules files and lists of rules -> RuleBook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._text import shown
from .._warn import one_line
from ..errors import ConfigError, UnknownNameError
from ..rules import RULES, RuleBook, Silence
from ._build import build_rule
from ._statistics import add_scalars, load_statistics
from ._yaml import Lines, read_yaml

__all__ = ["PRESETS", "load_rules"]

_FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
"""Names that `load_rules` knows."""

_KEYS = ("extends", "statistics", "scalars", "rules", "disable", "inhibits", "silences", "tests")
_MAX_EXTENDS = 16
_MAX_FILES = 64
MAX_MESSAGE = 1000
"""Characters of an error at most: names and values in it come from the file."""


def load_rules(spec: Any = "default", *, allow_code: bool = False) -> RuleBook:
    """Return the rules that `spec` stands for.

    Args:
        spec: the name of a preset (`"observe"`: measure, no rules; `"default"`: report only; `"autoclip"`: also clip
            spikes and skip non-finite steps), the path of a rules file, a mapping of what such a file would hold, a
            list of rules (objects, names, or mappings as in a rules file) and presets, or a RuleBook, which is returned
            as it is.
        allow_code: what names `module:Class` may be imported, which runs it. Rules are data: without this a file names
            only what is built in or registered by an installed package, and can do nothing but judge and treat.

    Raises:
        ConfigError: with the file and line, and the nearest valid names.
    """
    if isinstance(spec, RuleBook):
        return spec
    try:
        return _book(spec, allow_code)
    except ConfigError as error:
        # One line, whatever a file held that is part of it.
        if len(str(error)) <= MAX_MESSAGE and "\n" not in str(error):
            raise
        raise ConfigError(one_line(str(error), MAX_MESSAGE)) from None


def _book(spec: Any, allow_code: bool) -> RuleBook:
    if isinstance(spec, Path):
        return _Reader(allow_code).read(spec).book()
    if isinstance(spec, str):
        return _Reader(allow_code).read(_find(spec)).book()
    if isinstance(spec, (list, tuple)):
        return _listed(spec, allow_code)
    if isinstance(spec, Mapping):
        return _Reader(allow_code).take(spec, Lines("rules", allow_code=allow_code), Path(), ()).book()
    raise ConfigError(f"`rules` is a preset, a rules file, a list of rules or a RuleBook. Got {shown(spec)}.")


def _listed(items: Sequence[Any], allow_code: bool) -> RuleBook:
    presets = _Reader(allow_code)
    for name in items:
        if isinstance(name, str) and name in PRESETS:
            presets.read(_find(name))
    own = [
        _rule(item, f"rule {i} of the list", allow_code)
        for i, item in enumerate(items, 1)
        if not (isinstance(item, str) and item in PRESETS)
    ]
    return presets.book(own)


def _rule(item: Any, where: str, allow_code: bool) -> Any:
    if isinstance(item, Mapping):
        return build_rule(item, Lines(where, allow_code=allow_code), where, {})[1]
    if isinstance(item, str):
        if item not in RULES:
            raise UnknownNameError("rule", item, [*RULES, *PRESETS])
        return RULES[item]()
    return item


def _find(spec: str, folder: Path | None = None, where: str = "") -> Path:
    if spec in PRESETS:
        return _FOLDER / f"{spec}.yaml"
    path = (folder / spec) if folder is not None else Path(spec)
    with suppress(OSError, ValueError):  # too long a name, say: there is no such file
        if path.is_file():
            return path
    if path.suffix in (".yaml", ".yml") or "/" in spec:
        raise ConfigError(f"{where + ': ' if where else ''}there is no rules file {shown(str(path))}.")
    raise UnknownNameError("preset or rules file", spec, PRESETS, where=where)


class _Reader:
    """What was read so far; a file that extends another goes on from it."""

    def __init__(self, allow_code: bool) -> None:
        self.allow_code = allow_code
        self.num_files = 0
        self.rules: dict[str, Any] = {}
        self.inhibits: dict[str, Any] = {}
        self.silences: list[Silence] = []
        self.statistics: dict[str, Any] = {}

    def book(self, more: Sequence[Any] = ()) -> RuleBook:
        """Return what was read, and more rules beside."""
        return RuleBook(
            [*self.rules.values(), *more],
            inhibits=self.inhibits or None,
            silences=self.silences,
            statistics=tuple(self.statistics.values()),
        )

    def read(self, path: Path, above: tuple[Path, ...] = ()) -> _Reader:
        self.num_files += 1
        if self.num_files > _MAX_FILES:
            raise ConfigError(f"{path}: rules files extend each other more than {_MAX_FILES} times.")
        content, lines = read_yaml(path), Lines(str(path), allow_code=self.allow_code)
        if path.resolve() in above or len(above) > _MAX_EXTENDS:
            raise ConfigError(f"{lines.at(content, 'extends')}: this file extends itself.")
        return self.take(content, lines, path.parent, (*above, path.resolve()))

    def take(self, content: Mapping[str, Any], lines: Lines, folder: Path, above: tuple[Path, ...]) -> _Reader:
        for key in content:
            if key not in _KEYS:
                raise UnknownNameError("key of a rules file", key, _KEYS, where=lines.at(content, key))
        for parent in _texts(content, "extends", lines):
            self.read(_find(parent, folder, lines.at(content, "extends")), above)
        # Before the rules: their expressions may name these.
        where = lines.at(content, "statistics")
        self.statistics |= {s.name: s for s in _statistics(content, where, self.allow_code)}
        add_scalars(content.get("scalars") or (), lines.at(content, "scalars"))
        self._take_rules(content, lines)
        self._take_disabled(content, lines)
        self._take_rest(content, lines)
        return self

    def _take_rules(self, content: Any, lines: Lines) -> None:
        entries = content.get("rules") or []
        if not isinstance(entries, list):
            raise ConfigError(f"{lines.at(content, 'rules')}: `rules` is a list. Got {shown(entries)}.")
        here: dict[str, str] = {}
        for i, entry in enumerate(entries):
            where = lines.at(entries, i)
            name, rule = build_rule(entry, lines, where, self.rules)
            if name in here:
                raise ConfigError(f"{where}: a rule named {name!r} is already on {here[name]}. Give it a `name`.")
            here[name] = where
            if rule is None:
                del self.rules[name]
            else:
                self.rules[name] = rule

    def _take_disabled(self, content: Any, lines: Lines) -> None:
        for name in _texts(content, "disable", lines):
            if name not in self.rules:
                raise UnknownNameError("rule to switch off", name, self.rules, where=lines.at(content, "disable"))
            del self.rules[name]

    def _take_rest(self, content: Any, lines: Lines) -> None:
        inhibits = content.get("inhibits") or {}
        where = lines.at(content, "inhibits")
        if not isinstance(inhibits, Mapping):
            raise ConfigError(f"{where}: `inhibits` maps a rule to the rules it silences. Got {shown(inhibits)}.")
        known = {n for rule in self.rules.values() for n in (rule.name, rule.rule_name)} | set(RULES)
        for source, targets in inhibits.items():
            targets = _texts(inhibits, source, lines)
            for name in (source, *(t for t in targets if t != "*")):
                if name not in known:
                    raise UnknownNameError("rule", name, known, where=lines.at(inhibits, source))
            self.inhibits[source] = tuple(targets)
        silences = content.get("silences") or []
        if not isinstance(silences, list):
            raise ConfigError(f"{lines.at(content, 'silences')}: `silences` is a list. Got {shown(silences)}.")
        for i, entry in enumerate(silences):
            if not isinstance(entry, Mapping) or not set(entry) <= {"rules", "paths", "until", "reason"}:
                raise ConfigError(
                    f"{lines.at(silences, i)}: a silence has `rules`, `paths`, `until`, `reason`. Got {shown(entry)}."
                )
            told: dict[str, Any] = {k: _texts(entry, k, lines) for k in ("rules", "paths") if k in entry}
            told = {k: v[0] if len(v) == 1 else v for k, v in told.items()}
            until, reason = entry.get("until", -1), str(entry.get("reason", ""))
            if isinstance(until, bool) or not isinstance(until, int):
                raise ConfigError(f"{lines.at(entry, 'until')}: `until` is a step. Got {shown(until)}.")
            self.silences.append(Silence(until=until, reason=reason, **told))


def _texts(content: Any, key: Any, lines: Lines) -> list[str]:
    """Return what a key holds, one text or several, as a list."""
    given = content.get(key) or []
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"{lines.at(content, key)}: `{key}` takes names. Got {shown(given)}.")
    return list(found)


def _statistics(content: Any, where: str, allow_code: bool) -> tuple[Any, ...]:
    given = content.get("statistics") or ()
    if not isinstance(given, (str, list, tuple, Mapping)):
        raise ConfigError(f"{where}: `statistics` takes names. Got {shown(given)}.")
    return load_statistics(given, where, allow_code=allow_code)
