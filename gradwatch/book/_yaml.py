"""YAML that knows on which line everything stands."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

__all__ = ["Lines", "ListAt", "MapAt", "read_yaml"]

MAX_BYTES = 1_000_000


class MapAt(dict[Any, Any]):
    """A mapping with the line of itself and of each key, from 1."""

    line: int = 0
    lines: dict[Any, int]


class ListAt(list[Any]):
    """A sequence with the line of itself and of each item, from 1."""

    line: int = 0
    lines: list[int]


class Lines:
    """Where in a file something stands, for messages."""

    def __init__(self, file: str) -> None:
        self.file = file

    def at(self, node: Any, key: Any = None) -> str:
        """Return "FILE:LINE" of a mapping or sequence, or of one of its keys or items."""
        line = getattr(node, "line", 0)
        if key is not None and isinstance(node, (MapAt, ListAt)):
            with suppress(KeyError, IndexError):
                line = node.lines[key]
        return f"{self.file}:{line}" if line else self.file


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> MapAt:
    result = MapAt()
    result.line, result.lines = node.start_mark.line + 1, {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, (str, int, float, bool)):
            raise ConfigError(f"{node.start_mark.name}:{line}: a key must be a plain word. Got {key!r}.")
        if key in result:
            raise ConfigError(
                f"{node.start_mark.name}:{line}: {key!r} is given twice (first on line {result.lines[key]})."
            )
        result[key] = loader.construct_object(value_node, deep=True)
        result.lines[key] = line
    return result


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> ListAt:
    result = ListAt(loader.construct_object(child, deep=True) for child in node.value)
    result.line, result.lines = node.start_mark.line + 1, [child.start_mark.line + 1 for child in node.value]
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
# YAML 1.1 as PyYAML reads it takes 1e-3 for a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> MapAt:
    """Return the mapping that a file holds.

    Raises:
        ConfigError: the file can't be read, is no YAML, too large, or no mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the rules file can't be read ({error.strerror}).") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: a rules file has at most {MAX_BYTES} bytes. This one has {len(data)}.")
    try:
        text = data.decode()
        loader = _Loader(text)
        loader.name = str(path)
        content = loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}: this is not YAML ({what}).") from error
    if content is None:
        content = MapAt()
        content.lines = {}
    if not isinstance(content, MapAt):
        raise ConfigError(f"{path}:1: a rules file is a mapping with the key `rules`. Got a {type(content).__name__}.")
    return content
