"""YAML that knows on which line everything stands."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .._text import shown
from ..errors import ConfigError

__all__ = ["Lines", "ListAt", "MapAt", "read_yaml"]

MAX_BYTES = 200_000
MAX_PARTS = 50_000
"""Words, lists and mappings of a file, each counted as often as an alias repeats it."""
MAX_DEPTH = 32
MAX_NUMBER = 2**63


class MapAt(dict[Any, Any]):
    """A mapping with the line of itself and of each key, from 1."""

    line: int = 0
    lines: dict[Any, int]


class ListAt(list[Any]):
    """A sequence with the line of itself and of each item, from 1."""

    line: int = 0
    lines: list[int]


class Lines:
    """Where in a file something stands, for messages; and whether what the file names may be imported."""

    def __init__(self, file: str, *, allow_code: bool = False) -> None:
        self.file = file
        self.allow_code = allow_code

    def at(self, node: Any, key: Any = None) -> str:
        """Return "FILE:LINE" of a mapping or sequence, or of one of its keys or items."""
        line = getattr(node, "line", 0)
        if key is not None and isinstance(node, (MapAt, ListAt)):
            with suppress(KeyError, IndexError):
                line = node.lines[key]
        return f"{self.file}:{line}" if line else self.file


class _Loader(yaml.SafeLoader):
    """Reads mappings, lists, texts, numbers, `true`, `false` and `null`; a date is a text.

    What is nested too deep is refused as it is met: to scan it takes its depth squared.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        super().fetch_flow_collection_start(token)
        self._refuse(self.flow_level)

    def add_indent(self, column: int) -> bool:
        is_deeper = bool(super().add_indent(column))
        self._refuse(len(self.indents))
        return is_deeper

    def _refuse(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _too_deep(self.name, self.line)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> MapAt:
    result = MapAt()
    result.line, result.lines = node.start_mark.line + 1, {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, (str, int, float, bool)):
            raise ConfigError(f"{node.start_mark.name}:{line}: a key must be a plain word. Got {shown(key)}.")
        if key in result:
            raise ConfigError(
                f"{node.start_mark.name}:{line}: {shown(key)} is given twice (first on line {result.lines[key]})."
            )
        result[key] = loader.construct_object(value_node, deep=True)
        result.lines[key] = line
    return result


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> ListAt:
    result = ListAt(loader.construct_object(child, deep=True) for child in node.value)
    result.line, result.lines = node.start_mark.line + 1, [child.start_mark.line + 1 for child in node.value]
    return result


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    # Digits in base 60 and very long ones cost their length squared.
    number = loader.construct_yaml_int(node) if len(node.value) <= 80 else MAX_NUMBER
    if not -MAX_NUMBER < number < MAX_NUMBER:
        raise ConfigError(f"{node.start_mark.name}:{node.start_mark.line + 1}: a number is too large.")
    return int(number)


_PLAIN = ("map", "seq", "str", "int", "float", "bool", "null")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
# YAML 1.1 as PyYAML reads it takes 1e-3 for a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> MapAt:
    """Return the mapping that a file holds.

    Raises:
        ConfigError: the file can't be read, is no YAML, too large, or no mapping.
    """
    data = _bytes(path)
    try:
        content = _content(data.decode(), str(path))
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{where}: this is not YAML ({what}).") from None
    if content is None:
        content = MapAt()
        content.lines = {}
    if not isinstance(content, MapAt):
        raise ConfigError(f"{path}:1: a rules file is a mapping with the key `rules`. Got a {type(content).__name__}.")
    return content


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise ConfigError(f"{path}: there is no such rules file.")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the rules file can't be read ({getattr(error, 'strerror', error)}).") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: a rules file has at most {MAX_BYTES:,} bytes. This one has more.")
    return data


def _content(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_parts(node, {}, name, 1) > MAX_PARTS:
            raise ConfigError(f"{name}: aliases repeat so much that this file has more than {MAX_PARTS:,} parts.")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _too_deep(name: str, line: int) -> ConfigError:
    return ConfigError(f"{name}:{line + 1}: this is nested more than {MAX_DEPTH} deep.")


def _num_parts(node: yaml.Node, known: dict[int, int], name: str, depth: int) -> int:
    """Return how many parts a node has with every alias written out; those met before are not walked again."""
    if id(node) in known:
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise _too_deep(name, node.start_mark.line)
    known[id(node)] = 0  # an alias of what it stands in is refused when it is constructed
    inner: list[yaml.Node] = []
    total = 1
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = list(node.value)
    else:
        total += len(node.value) // 100  # a long text that is repeated is large, too
    total += sum(_num_parts(part, known, name, depth + 1) for part in inner)
    known[id(node)] = total
    return total
