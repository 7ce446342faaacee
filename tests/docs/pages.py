"""The pages and their blocks of code.

A block is run unless the line above its fence says otherwise, as an HTML comment that a reader does not see:

    <!-- block: skip, why -->    can't run here
    <!-- block: slow -->         takes seconds: the page's blocks up to it and it are run by `make test-slow`
    <!-- block: file NAME -->    is written to NAME and not run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?:^<!-- block: (?P<how>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
HOWS = ("skip", "slow", "file")


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is that of its first line of code."""

    page: Path
    language: str
    code: str
    line: int
    how: str = ""
    what: str = ""

    def compiled(self):
        # Line numbers of the page, so that a failure points there.
        return compile("\n" * (self.line - 1) + self.code, str(self.page.relative_to(ROOT)), "exec")


def blocks(page: Path, language: str) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        if match["language"] == language:
            how, _, what = (match["how"] or "").partition(" ")
            line = text[: match.start("code")].count("\n") + 1
            found.append(Block(page, language, match["code"], line, how.rstrip(","), what))
    return found
