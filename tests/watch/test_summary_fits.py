"""The words at the end of a run: as many as it deserves, within 80 columns, on stderr, with a fair cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.callbacks._say import fitted, say_beside, say_ending
from gradwatch.notebook import LiveCell
from gradwatch.watch._settings import _live

PROGRAM = """
import sys, torch
from torch import nn
from gradwatch import Watch
from gradwatch.callbacks._say import say_ending
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with Watch(model, optimizer) as watch:
    for i in range(5):
        loss = model(torch.ones(2, 4)).square().mean() * (float("nan") if i == 3 else 1)
        loss.backward()
        watch.step(loss)
        optimizer.zero_grad()
say_ending(watch.session)
print("result")
"""


def train(steps: int, layers: int = 60) -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, on_error="raise") as watch:
        for _ in range(steps):
            model(torch.ones(2, 4)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
    return watch


def test_a_short_run_has_a_short_summary() -> None:
    lines = train(24).summary().split("\n")
    assert len(lines) <= 24
    assert any(line.startswith("... and 52 layers between these") for line in lines)


def test_rules_without_evidence_are_counted_and_not_listed() -> None:
    watch = train(24)
    (told,) = [line for line in watch.summary().split("\n") if "nothing to judge" in line]
    number = int(told.removeprefix("note: ").split(" of ")[0])
    assert number > 20
    assert len(told) < 100
    never = {c.name for c in watch.session.engine.judge.coverage if not c.judged and c.reason}
    assert len(never) == number
    assert never <= watch.verdict().unjudged.keys()


@pytest.mark.slow
def test_a_long_run_has_its_forty_layers() -> None:
    assert sum(".weight " in line for line in train(490).summary().split("\n")) == 40


def test_every_line_fits_eighty_columns() -> None:
    text = fitted(train(24).summary(), 80)
    assert max(map(len, text.split("\n"))) <= 80


def test_what_goes_on_in_the_next_line_is_set_in() -> None:
    text = "  " + "word " * 30
    first, second, *_ = fitted(text.rstrip(), 60).split("\n")
    assert first.startswith("  word")
    assert second.startswith("      word")


def test_the_cost_is_said_of_a_step_and_never_as_a_share_alone() -> None:
    (line,) = [line for line in train(24, layers=2).summary().split("\n") if "gradwatch itself" in line]
    assert line.startswith("gradwatch itself: ")
    assert " a step, of " in line
    assert "%" not in line


def test_of_a_few_steps_no_cost_is_said() -> None:
    assert "gradwatch itself" not in train(5, layers=2).summary()


def test_of_many_parameters_that_were_not_seen_five_are_named_and_the_rest_counted() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(8)))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-3)
    with Watch(model, optimizer, on_error="raise") as watch:
        model(torch.ones(2, 2)).square().mean().backward()
        watch.step()
    text = " ".join(watch.summary().split())
    assert f"in no optimizer: {', '.join(f'{i}.weight' for i in range(1, 6))} and 2 more" in text


@pytest.mark.parametrize(
    ("given", "seconds"), [(True, LiveCell().seconds), (0.25, 0.25), (False, 0.0), (None, 0.0)], ids=str
)
def test_a_live_cell_is_drawn_as_often_as_was_asked_for(given: bool | float | None, seconds: float) -> None:
    assert _live(given) == seconds


def test_nothing_is_printed_between_a_program_and_its_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "result\n"
    assert "non_finite" in done.stderr


def test_beside_a_bar_lines_go_where_the_bar_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Plain:
        def print(self, *texts: str) -> None:
            raise AssertionError("the pipe's")

    class Bar:
        def print(self, *texts: str, file=None) -> None:
            print(*texts, file=file)

    for bar in (None, Plain(), Bar()):
        say_beside(bar, "a line")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "a line\n" * 3


def test_an_ending_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_ending(train(24, layers=2).session)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("gradwatch: 24 records") == 1
