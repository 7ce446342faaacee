"""The tab's ES modules as one script: a file opened from disk may not import others.

It knows the form in which these modules are written, and refuses any other: `import {a, b} from './x.js';`,
`import x from './x.js';`, `export` before a function, class or const, `export default x;` at the end.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from tensorboard_plugin_gradwatch import STATIC

__all__ = ["bundle", "styles"]

IMPORT = re.compile(r"^import\s+(?:\{([^}]*)\}|(\w+))\s+from\s+'\./([\w./-]+)';\s*?$", re.MULTILINE)
EXPORT = re.compile(r"^export\s+((?:async\s+)?function\*?|class|const|let)\s+(\w+)", re.MULTILINE)
DEFAULT = re.compile(r"^export default (\w+);\s*$", re.MULTILINE)
UNKNOWN = re.compile(r"^(?:import|export)\b.*$", re.MULTILINE)


@lru_cache(maxsize=4)
def bundle(entry: str = "report.js") -> str:
    """Return the entry module and all it imports, each in a scope of its own, dependencies first.

    Raises:
        ValueError: a module is written in another form, imports in a circle, or would end a script element.
    """
    written: dict[str, str] = {}
    _add(STATIC / entry, written, ())
    return "'use strict';\n" + "\n".join(written.values())


@lru_cache(maxsize=1)
def styles() -> str:
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in ("vendor/uPlot.min.css", "style.css"))


def _add(file: Path, written: dict[str, str], above: tuple[Path, ...]) -> str:
    """Write a module and its dependencies; returns the name of the constant that holds what it exports."""
    file = file.resolve()
    name = "$" + re.sub(r"\W", "_", file.relative_to(STATIC.resolve()).as_posix())
    if file in above:
        raise ValueError(f"{file.name} imports itself by way of {', '.join(f.name for f in above)}.")
    if name in written:
        return name
    source = file.read_text(encoding="utf-8")

    def imported(match: re.Match[str]) -> str:
        module = _add(file.parent / match[3], written, (*above, file))
        names = match[1] if match[1] is not None else f" default: {match[2]} "
        return f"const {{{names}}} = {module};"

    body = IMPORT.sub(imported, source)
    exports = [m[2] for m in EXPORT.finditer(body)]
    body = EXPORT.sub(lambda m: f"{m[1]} {m[2]}", body)
    exports += [f"default: {m[1]}" for m in DEFAULT.finditer(body)]
    body = DEFAULT.sub("", body)
    left = UNKNOWN.search(body)
    if left:
        raise ValueError(f"{file.name}: don't know how to bundle {left.group()!r}.")
    if "</script" in body.lower() or "<!--" in body:
        raise ValueError(f"{file.name} holds what would end or disturb a script element.")
    written[name] = f"const {name} = (() => {{\n{body.strip()}\nreturn {{{', '.join(exports)}}};\n}})();"
    return name
