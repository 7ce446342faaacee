"""The gallery: a page with the picture of each run, the verdict on it, and its incidents in their order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gradwatch.records import rank_incidents
from gradwatch.runs import Run, read_run

__all__ = ["write_gallery"]

HEAD = """# Gallery

Small real runs, each with its picture, what gradwatch said of it, and why. `python tools/pictures.py` trains them at
default settings, draws them and writes this page. How to read the pictures: [is my training healthy?](healthy.md)
"""


def write_gallery(runs: Mapping[str, tuple[Path, str]], page: Path) -> None:
    """Write the page.

    Args:
        runs: picture -> run folder, and its title.
        page: to be written.
    """
    parts = [
        HEAD,
        *(_entry(name, read_run(folder), title) for name, (folder, title) in runs.items() if folder.exists()),
    ]
    page.write_text("\n".join(parts), encoding="utf-8")


def _entry(name: str, run: Run, title: str) -> str:
    lines = [
        f"## {title[0].upper()}{title[1:]}",
        "",
        f"![{title}](pictures/{name}.png)",
        "",
        f"**{run.verdict()}**",
        "",
    ]
    for incident, cause in rank_incidents(run.incidents):
        what = f"`{incident.name or incident.rule}` at step {incident.first_step}: {_flat(incident.seen)}"
        lines.append(f"{'  ' if cause else ''}- {what}")
        if incident.advice and cause is None:
            lines.append(f"  <br>{_flat(incident.advice)}")
    return "\n".join([*lines, ""])


def _flat(text: str) -> str:
    """Return text in which markdown finds nothing of its own but `code`."""
    parts = " ".join(text.split()).split("`")
    for place in range(0, len(parts), 2):
        for character in "\\*_[]<>|#":
            parts[place] = parts[place].replace(character, "\\" + character)
    return "`".join(parts)
