"""A run reads its own clocks: a program that fakes `time.time` for itself fakes it for nobody else."""

import ast
import itertools
import sys
import time
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch import Watch
from gradwatch.runs import read_run

ROOT = Path(gradwatch.__file__).parent
CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "time_ns", "monotonic_ns", "perf_counter_ns")


def borrowed_clocks(source: str) -> list[str]:
    """Clocks that a file looks up when it needs them, instead of binding them when it is imported."""
    found: list[str] = []
    if "time" not in source:
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            word = f"{node.value.id}.{node.attr}"
            if (node.value.id == "time" and node.attr in CLOCKS) or word in ("datetime.now", "datetime.utcnow"):
                found.append(word)
    return found


def test_no_file_looks_a_clock_up_in_its_module() -> None:
    borrowed = {str(file.relative_to(ROOT)): borrowed_clocks(file.read_text()) for file in ROOT.rglob("*.py")}
    assert {file: words for file, words in borrowed.items() if words} == {}


@pytest.mark.parametrize("source", ["import time\ntime.time()", "import time\nx = time.monotonic", "datetime.now()"])
def test_the_look_for_borrowed_clocks_can_fail(source: str) -> None:
    assert borrowed_clocks(source)


def train(folder: Path) -> Watch:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    everything = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "autopsy": True}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, rules="autoclip", run_dir=folder, on_error="raise", **everything) as watch:
        for step in range(6):
            loss = model(torch.full((8, 4), float("nan") if step == 4 else 1.0)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch


def test_a_run_under_faked_clocks_asks_none_of_them_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, backwards = [], itertools.count(0, -1000)

    def fake(name: str):
        def clock():
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] in ("gradwatch", "tensorboard_plugin_gradwatch"):
                asked.append((name, caller))
            return next(backwards)

        return clock

    for name in CLOCKS:
        monkeypatch.setattr(time, name, fake(name))
    watch = train(tmp_path / "run")
    assert asked == []
    assert [r.step for r in watch.history] == list(range(6))
    assert all(r.time > 1e9 for r in watch.history)


def test_a_clock_that_runs_backwards_harms_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where a tool for tests freezes or turns the time in every module, or the machine's clock is set.
    ticks = itertools.count(1e6, -1000)
    replaced = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("gradwatch"):
            for clock in set(CLOCKS) & set(vars(module)):
                if callable(getattr(module, clock)) and getattr(module, clock) is getattr(time, clock):
                    monkeypatch.setattr(module, clock, lambda: next(ticks))
                    replaced += 1
    assert replaced >= 3
    watch = train(tmp_path / "run")
    assert [r.step for r in watch.history] == list(range(6))
    assert len(list(read_run(tmp_path / "run").records())) == 6
    watch.report(tmp_path / "report.html")
