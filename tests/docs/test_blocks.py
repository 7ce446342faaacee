"""Every block of Python in README.md and docs/ runs, page by page, in order, in a folder of its own; commands parse."""

from __future__ import annotations

import ast
import inspect
import shlex
import sys
from functools import partial
from types import ModuleType

import lightning.pytorch
import pytest

from gradwatch.book import load_rules
from gradwatch.cli._main import COMMANDS as known_commands
from gradwatch.cli._main import _parser

from .pages import HOWS, PAGES, ROOT, blocks
from .preludes import common, write_runs

ALONE = ("quickstart.md", "notebooks.md")
"""Pages that are pasted from the top: nothing is taken for granted there."""
QUICK = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def run_page(page, *, slow: bool, request, tmp_path, monkeypatch) -> int:
    """Run the blocks of a page, and the tests that they define; return how many ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "".join(b.code for b in blocks(page, "python"))
    if "runs/" in text:
        write_runs(tmp_path)
    # Dataclasses look their module up.
    module = ModuleType("gradwatch_docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace, num_run = vars(module), 0
    # A Trainer without settings would train for a thousand epochs.
    monkeypatch.setattr("lightning.pytorch.Trainer", partial(lightning.pytorch.Trainer, **QUICK))
    if page.name not in ALONE:
        namespace.update(common())
    before = set(sys.modules)
    try:
        for block in blocks(page, "python"):
            if block.how == "skip" or (block.how == "slow" and not slow):
                continue
            if block.how == "file":
                target = tmp_path / block.what
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.code)
                continue
            known = set(namespace)
            exec(block.compiled(), namespace)
            for name in [n for n in namespace if n.startswith("test_") and n not in known]:
                test = namespace.pop(name)
                test(**{argument: request.getfixturevalue(argument) for argument in inspect.signature(test).parameters})
            num_run += 1
    finally:
        for name in set(sys.modules) - before:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    return num_run


def imported(tree) -> set[str]:
    """Names that a block imports."""
    found = [alias for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return {(alias.asname or alias.name).partition(".")[0] for alias in found}


def bound(tree) -> set[str]:
    """Names that a block makes: by import, definition, assignment, or as an argument."""
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


TREES = [(block, ast.parse(block.code)) for page in PAGES for block in blocks(page, "python")]
IMPORTED = set().union(*(imported(tree) for _, tree in TREES))
"""What some block of some page imports: these names are a package's, not the reader's own."""


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.parent != ROOT], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_imports_what_it_uses(page) -> None:
    for block, tree in TREES:
        if block.page == page:
            used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            missing = (used & IMPORTED) - bound(tree)
            assert not missing, f"{page.name}, line {block.line}: no import of {sorted(missing)}"


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, request, tmp_path, monkeypatch, capsys) -> None:
    num_run = run_page(page, slow=False, request=request, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert num_run == sum(b.how not in ("skip", "slow", "file") for b in blocks(page, "python"))


SLOW = [page for page in WITH_CODE if any(b.how == "slow" for b in blocks(page, "python"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_slow_code_of_a_page_runs(page, request, tmp_path, monkeypatch, capsys) -> None:
    num_run = run_page(page, slow=True, request=request, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert num_run == sum(b.how not in ("skip", "file") for b in blocks(page, "python"))


COMMANDS = [
    pytest.param(line, id=f"{block.page.name}-{line}")
    for page in PAGES
    for language in ("text", "console")
    for block in blocks(page, language)
    for line in (text.removeprefix("$ ").partition("  ")[0].strip() for text in block.code.splitlines())
    if line.startswith("gradwatch ") and line.split()[1] in known_commands
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_on_the_pages_are_understood(line) -> None:
    command = line.partition(" > ")[0].partition(" #")[0]
    assert _parser().parse_args(shlex.split(command)[1:]).command in known_commands


RULES = [b for page in PAGES if page.name != "rules.md" for b in blocks(page, "yaml") if "\nrules:" in "\n" + b.code]


@pytest.mark.parametrize("block", RULES, ids=lambda b: f"{b.page.name}-{b.line}")
def test_rules_on_the_pages_load(block, tmp_path) -> None:
    (tmp_path / "rules.yaml").write_text(block.code)
    assert len(load_rules(tmp_path / "rules.yaml").rules) > 0


def test_directives_are_known_and_say_why() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            assert block.how in ("", *HOWS), f"{page.name}, line {block.line}: {block.how!r}"
            assert block.how in ("", "slow") or block.what, f"{page.name}, line {block.line}: {block.how} needs a word"


def test_most_blocks_run() -> None:
    found = [b for page in PAGES for b in blocks(page, "python")]
    assert len(found) > 40
    assert sum(b.how == "skip" for b in found) <= len(found) // 10
