"""A source text, addressed as `ast` addresses it."""

from __future__ import annotations

import ast
import re

__all__ = ["Text", "flat"]


class Text:
    """A source text, addressed as `ast` does: lines from 1, columns in UTF-8 bytes."""

    def __init__(self, text: str) -> None:
        self.bytes = text.encode()
        self._starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.bytes[start:end].decode()

    def with_(self, start: int, end: int, new: str) -> str:
        return (self.bytes[:start] + new.encode() + self.bytes[end:]).decode()


def flat(text: str) -> str:
    """One line of code: comments and line breaks taken out."""
    lines = (re.sub(r"\s\s#.*$", "", line).strip() for line in text.strip().splitlines())
    return " ".join(line for line in lines if line and not line.startswith("#"))
