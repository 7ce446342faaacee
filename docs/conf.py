"""Sphinx configuration. `make docs` builds the site without a network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradwatch import __version__

project = "gradwatch"
author = "The gradwatch developers"
copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings = [
    "toc.empty_glob",
    "ref.python",  # attributes that are listed together are taken for types, and several classes have a `name`
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"gradwatch {release}"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
templates_path: list[str] = []


def markdown_to_rst(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are written with Markdown's backticks, since that is what editors show: `code`, and fences."""
    text = "\n".join(lines)
    text = re.sub(r"(?ms)^( *)```\w*\n(.*?)^ *```$", _literal_block, text)
    text = re.sub(r"(?<!`)`([^`\n]+(?:\n *[^`\n]+)?)`(?!`)", lambda m: f"``{' '.join(m[1].split())}``", text)
    # A bar outside a literal would be a substitution.
    parts = re.split(r"(``.*?``)", text)
    text = "".join(part if part.startswith("``") else part.replace("|", "\\|") for part in parts)
    lines[:] = text.split("\n")


def _literal_block(match: re.Match[str]) -> str:
    indented = "\n".join("    " + line if line.strip() else "" for line in match[2].splitlines())
    return f"{match[1]}::\n\n{indented}\n"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)  # before napoleon
