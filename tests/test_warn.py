"""What gradwatch has to say of itself never ends a run, whatever became of the ways to say it."""

import ast
import logging
import sys
import warnings
from pathlib import Path

import pytest

import gradwatch
from gradwatch._warn import LIMIT, log, one_line, warn
from gradwatch.errors import GradwatchWarning

ROOT = Path(gradwatch.__file__).parent
# A command's own process, and code that silences others.
AT_HOME = {
    "_warn.py",
    "cli/_main.py",
    "cli/_demo.py",
    "_preflight/_preflight.py",
    "rules/expression/_parse.py",
    "trials/_what_if.py",
}


class Broken(logging.Handler):
    num_asked = 0

    def emit(self, record):
        self.num_asked += 1
        raise RuntimeError("this handler is broken")


def test_a_warning_names_the_caller_and_its_category():
    with pytest.warns(GradwatchWarning, match="^here$") as caught:
        warn("here")
    assert caught[0].filename == __file__


def test_where_warnings_are_errors_the_logger_is_told(unheard, caplog):
    warnings.simplefilter("error")
    warn("one part is off")
    assert unheard == ["one part is off"]
    assert caplog.messages == ["one part is off"]
    unheard.clear()


def test_a_broken_showwarning_a_broken_handler_and_a_closed_stderr_lose_the_line_alone(unheard, monkeypatch):
    def show(*args, **kwargs):
        raise OSError("nowhere to show it")

    logger, broken = logging.getLogger("gradwatch"), Broken()
    warnings.simplefilter("always")
    logger.addHandler(broken)
    monkeypatch.setattr(warnings, "showwarning", show)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        warn("lost")
        log("lost too")
    finally:
        logger.removeHandler(broken)
    assert broken.num_asked
    assert unheard == ["lost"]
    unheard.clear()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(ValueError("two\n  lines"), "ValueError: two lines", id="lines"),
        pytest.param(KeyError(), "KeyError", id="no-words"),
        pytest.param("text", "text", id="text"),
    ],
)
def test_an_error_is_told_in_one_line(given, expected):
    assert one_line(given) == expected


def test_an_error_that_fills_a_screen_is_cut():
    assert len(one_line(RuntimeError("x" * 10_000))) == LIMIT


def test_an_error_whose_words_raise_is_told_by_its_type():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    assert one_line(Mute()).startswith("Mute: ")


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_every_warning_goes_through_the_one_door(file):
    if str(file.relative_to(ROOT)) in AT_HOME:
        return
    imported = {a.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import) for a in n.names}
    assert "warnings" not in imported
