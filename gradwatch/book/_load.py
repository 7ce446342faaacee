"""Presets, rules files and lists of rules -> RuleBook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ..rules import RULES, RuleBook, Silence
from ._build import build_rule
from ._yaml import Lines, read_yaml

__all__ = ["PRESETS", "load_rules"]

_FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
"""Names that `load_rules` knows."""

_KEYS = ("extends", "rules", "disable", "inhibits", "silences", "tests")
_MAX_EXTENDS = 16


def load_rules(spec: Any = "default") -> RuleBook:
    """Return the rules that `spec` stands for.

    Args:
        spec: the name of a preset (`"observe"`: measure, no rules; `"default"`: report only; `"autoclip"`: also clip
            spikes and skip non-finite steps), the path of a rules file, a mapping of what such a file would hold, a
            list of rules (objects, names, or mappings as in a rules file), or a RuleBook, which is returned as it is.

    Raises:
        ConfigError: with the file and line, and the nearest valid names.
    """
    if isinstance(spec, RuleBook):
        return spec
    if isinstance(spec, Path):
        return _Reader().read(spec).book()
    if isinstance(spec, str):
        return _Reader().read(_find(spec)).book()
    if isinstance(spec, (list, tuple)):
        return RuleBook([_rule(item, f"rule {i} of the list") for i, item in enumerate(spec, 1)])
    if isinstance(spec, Mapping):
        return _Reader().take(spec, Lines("rules"), Path(), ()).book()
    raise ConfigError(f"`rules` is a preset, a rules file, a list of rules or a RuleBook. Got {spec!r}.")


def _rule(item: Any, where: str) -> Any:
    if isinstance(item, Mapping):
        return build_rule(item, Lines(where), where, {})[1]
    if isinstance(item, str):
        if item not in RULES:
            raise UnknownNameError("rule", item, RULES)
        return RULES[item]()
    return item


def _find(spec: str, folder: Path | None = None, where: str = "") -> Path:
    if spec in PRESETS:
        return _FOLDER / f"{spec}.yaml"
    path = (folder / spec) if folder is not None else Path(spec)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in spec:
        raise ConfigError(f"{where + ': ' if where else ''}there is no rules file {str(path)!r}.")
    raise UnknownNameError("preset or rules file", spec, PRESETS, where=where)


class _Reader:
    """What was read so far; a file that extends another goes on from it."""

    def __init__(self) -> None:
        self.rules: dict[str, Any] = {}
        self.inhibits: dict[str, Any] = {}
        self.silences: list[Silence] = []

    def book(self) -> RuleBook:
        return RuleBook(self.rules.values(), inhibits=self.inhibits or None, silences=self.silences)

    def read(self, path: Path, above: tuple[Path, ...] = ()) -> _Reader:
        content, lines = read_yaml(path), Lines(str(path))
        if path.resolve() in above or len(above) > _MAX_EXTENDS:
            raise ConfigError(f"{lines.at(content, 'extends')}: this file extends itself.")
        return self.take(content, lines, path.parent, (*above, path.resolve()))

    def take(self, content: Mapping[str, Any], lines: Lines, folder: Path, above: tuple[Path, ...]) -> _Reader:
        for key in content:
            if key not in _KEYS:
                raise UnknownNameError("key of a rules file", key, _KEYS, where=lines.at(content, key))
        extends = content.get("extends") or []
        for parent in [extends] if isinstance(extends, str) else extends:
            where = lines.at(content, "extends")
            if not isinstance(parent, str):
                raise ConfigError(f"{where}: `extends` takes presets and rules files. Got {parent!r}.")
            self.read(_find(parent, folder, where), above)
        self._take_rules(content, lines)
        self._take_disabled(content, lines)
        self._take_rest(content, lines)
        return self

    def _take_rules(self, content: Any, lines: Lines) -> None:
        entries = content.get("rules") or []
        if not isinstance(entries, list):
            raise ConfigError(f"{lines.at(content, 'rules')}: `rules` is a list. Got {entries!r}.")
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
        disable = content.get("disable") or []
        for name in [disable] if isinstance(disable, str) else disable:
            if name not in self.rules:
                raise UnknownNameError("rule to switch off", name, self.rules, where=lines.at(content, "disable"))
            del self.rules[name]

    def _take_rest(self, content: Any, lines: Lines) -> None:
        inhibits = content.get("inhibits") or {}
        where = lines.at(content, "inhibits")
        if not isinstance(inhibits, Mapping):
            raise ConfigError(f"{where}: `inhibits` maps a rule to the rules it silences. Got {inhibits!r}.")
        known = {n for rule in self.rules.values() for n in (rule.name, rule.rule_name)} | set(RULES)
        for source, targets in inhibits.items():
            targets = [targets] if isinstance(targets, str) else list(targets or ())
            for name in (source, *(t for t in targets if t != "*")):
                if name not in known:
                    raise UnknownNameError("rule", name, known, where=lines.at(inhibits, source))
            self.inhibits[source] = tuple(targets)
        silences = content.get("silences") or []
        for i, entry in enumerate(silences):
            if not isinstance(entry, Mapping) or not set(entry) <= {"rules", "paths", "until", "reason"}:
                raise ConfigError(
                    f"{lines.at(silences, i)}: a silence has `rules`, `paths`, `until`, `reason`. Got {entry!r}."
                )
            self.silences.append(Silence(**entry))
