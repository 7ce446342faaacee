from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.cli import FINE, FOUND, USAGE, main
from gradwatch.cli._main import COMMANDS
from gradwatch.cli._outcome import severe


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys) -> None:
    assert main([command, "--help"]) == FINE
    assert f"usage: gradwatch {command}" in capsys.readouterr().out


def test_help_lists_commands_and_exit_codes(capsys) -> None:
    assert main(["--help"]) == FINE
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)
    assert "exit codes:" in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(["sumary", "x"], "gradwatch: there is no command 'sumary'. Did you mean 'summary'?", id="command"),
        pytest.param(["summary"], "gradwatch: summary: the following arguments are required: RUN", id="missing"),
        pytest.param(
            ["summary", "x", "--lyers", "3"],
            "gradwatch: summary has no option '--lyers'. Did you mean '--layers'?",
            id="option",
        ),
        pytest.param(
            ["report", "x", "--format", "htm"],
            "gradwatch: there is no value of --format 'htm'. Did you mean 'html'?",
            id="choice",
        ),
        pytest.param(
            ["summary", "x", "--layers", "many"],
            "gradwatch: summary: argument --layers: invalid int value: 'many'",
            id="number",
        ),
        pytest.param(
            ["summary", "nowhere/x"], "gradwatch: there is no run 'nowhere/x', nor a folder 'nowhere'.", id="path"
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, line, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == USAGE
    out, err = capsys.readouterr()
    assert err == line + "\n"
    assert out == ""


def test_no_command_names_the_commands(capsys) -> None:
    assert main([]) == USAGE
    assert capsys.readouterr().err == f"gradwatch: give a command: {', '.join(COMMANDS)}. See gradwatch --help.\n"


def test_traceback_is_shown_when_asked_for(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no run"):
        main(["--traceback", "summary", str(tmp_path / "x")])


def test_interrupt_is_130(monkeypatch, healthy, capsys) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradwatch.cli._summary.show_summary", interrupt)
    monkeypatch.setattr("gradwatch.cli._summary.gathered", interrupt)
    assert main(["summary", str(healthy)]) == 130


@pytest.mark.parametrize(
    ("severities", "fail_on", "code"),
    [
        ((), "info", FINE),
        (("info",), "warning", FINE),
        (("info", "warning"), "warning", FOUND),
        (("warning",), "critical", FINE),
        (("critical",), "critical", FOUND),
        (("critical",), "never", FINE),
        (("unheard-of",), "critical", FOUND),
    ],
)
def test_verdict(severities, fail_on, code) -> None:
    assert severe(severities, fail_on) == code


def test_help_and_summary_load_neither_torch_nor_a_trainer(healthy) -> None:
    program = (
        "import sys; from gradwatch.cli import main; main(['--help']); "
        f"main(['summary', {str(healthy)!r}]); main(['report', {str(healthy)!r}]); "
        "print([m for m in ('torch', 'pytorch_lightning', 'lightning', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_module_and_a_reader_that_goes_away(healthy) -> None:
    command = f"{sys.executable} -m gradwatch summary {healthy} --json | head -c 10; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert Path(healthy).exists()
