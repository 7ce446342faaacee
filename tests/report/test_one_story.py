"""Tab, report and terminal tell the same story of a run, in the same order: twelve kinds of runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.cli import main
from gradwatch.records import rank_incidents
from gradwatch.report import ReportData, summarise, to_html, to_json, to_markdown
from gradwatch.runs import read_run
from tensorboard_plugin_gradwatch._folders import FolderRun, run_folder_at

STEPS = 160
Batch = tuple[Tensor, Tensor]


def relu(depth: int = 2, width: int = 16) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *layers, nn.Linear(width, 1))


def sigmoid() -> nn.Sequential:
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), *layers, nn.Linear(16, 1))


def dead() -> nn.Sequential:
    model = relu()
    nn.init.constant_(model[2].bias, -50.0)
    return model


def usual(step: int) -> Batch:
    x = torch.randn(32, 8)
    return x, x.sum(1, keepdim=True)


def at(*steps: int, factor: float) -> Callable[[int], Batch]:
    def batch(step: int) -> Batch:
        x, y = usual(step)
        return x, y * factor if step in steps else y

    return batch


def spike_then_nan(step: int) -> Batch:
    x, y = usual(step)
    return x, y * {80: 1000.0, 120: float("nan")}.get(step, 1.0)


def unnormalised(step: int) -> Batch:
    x, y = usual(step)
    return 300.0 + 100.0 * x, y


def constant(step: int) -> Batch:
    return usual(step)[0], torch.ones(32, 1)


# What it is called: model, batches, learning rate, rules, and what else goes wrong.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], float, str, str]] = {
    "healthy": (relu, usual, 1e-2, "default", ""),
    "spike": (relu, at(80, factor=1000.0), 1e-3, "default", ""),
    "spike, treated": (relu, at(80, factor=1000.0), 1e-3, "autoclip", ""),
    "nan batch": (relu, at(80, factor=float("nan")), 1e-3, "default", ""),
    "nan batch, treated": (relu, at(80, 81, factor=float("nan")), 1e-3, "autoclip", ""),
    "spike, then nan": (relu, spike_then_nan, 1e-3, "default", ""),
    "vanishing": (sigmoid, usual, 1e-2, "default", ""),
    "dead units": (dead, usual, 1e-2, "default", ""),
    "weights not held": (relu, usual, 1e-2, "default", "not held"),
    "rate too high": (relu, usual, 3.0, "default", ""),
    "not reset, not held, unnormalised": (relu, unnormalised, 1e-3, "default", "not reset, not held"),
    "constant targets": (relu, constant, 1e-2, "default", ""),
}


def train(folder: Path, kind: str) -> Watch:
    torch.manual_seed(0)
    make, batch, rate, rules, wrong = KINDS[kind]
    model = make()
    held = list(model.parameters())[2:] if "not held" in wrong else list(model.parameters())
    optimizer = torch.optim.SGD(held, lr=rate)
    with Watch(model, optimizer, rules=rules, run_dir=folder, on_error="raise") as watch:
        for step in range(STEPS):
            x, y = batch(step)
            output = model(x)
            loss = (output - y).square().mean()
            loss.backward()
            watch.step(loss, batch=(x, y), outputs=output, targets=y)
            if "not reset" not in wrong:
                optimizer.zero_grad()
    return watch


def live(watch: Watch) -> list[tuple[str, int]]:
    found = re.findall(r"\[(?:info|warning|critical)\] step (\d+): (\S+) in", watch.summary())
    return [(rule, int(step)) for step, rule in found]


def terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[tuple[str, int]]]:
    capsys.readouterr()
    main(["summary", str(folder)])
    said = capsys.readouterr().out
    rows = re.findall(r"^ *(\d+)  (?:info|warning|critical) +(\S+)  ", said, re.MULTILINE)
    return said, [(rule, int(step)) for step, rule in rows]


def rules_of(story: list[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(rule for rule, _ in story))


def test_what_gradwatch_itself_took_is_one_number_at_every_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = train(tmp_path / "run", "healthy")
    (told,) = re.findall(r"gradwatch itself: (.* a step, of .*)", watch.summary())
    assert told in read_run(tmp_path / "run").summary
    for data in (ReportData.from_run(read_run(tmp_path / "run")), ReportData.from_records(watch.history)):
        assert any(fact.startswith(f"gradwatch itself: {told};") for fact in summarise(data).facts)
    assert f"gradwatch itself: {told};" in terminal(tmp_path / "run", capsys)[0]


@pytest.mark.parametrize(
    "ending", [None, ValueError("boom\nand more"), KeyboardInterrupt()], ids=["closed", "crash", "^C"]
)
def test_how_a_run_ended_is_said_in_one_way(ending: BaseException | None, tmp_path: Path) -> None:
    model = relu()
    watch = Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir=tmp_path / "run")
    with contextlib.suppress(ValueError, KeyboardInterrupt), watch if ending else contextlib.nullcontext():
        for _ in range(3):
            model(usual(0)[0]).sum().backward()
            watch.step()
        if ending:
            raise ending
    if not ending:
        watch.close()
    assert watch.verdict().headline == read_run(tmp_path / "run").verdict().headline


def test_a_run_of_which_too_little_was_seen_is_not_shown_in_the_colour_of_health(tmp_path: Path) -> None:
    model = relu()
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir=tmp_path / "run"):
        pass
    page = to_html(ReportData.from_run(read_run(tmp_path / "run")))
    (state,) = re.findall(r'<header class="gw-report (gw-state-\w+)"', page)
    assert state == "gw-state-unseen"
    tone = re.search(r"\.gw-state-unseen \{ --gw-tone: var\(--gw-(\w+)\)", page)
    assert tone is not None
    assert tone[1] != "good"


def test_the_largest_of_nan_is_nan_at_every_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "nan batch")
    said, _ = terminal(tmp_path / "run", capsys)
    (row,) = re.findall(r"^0\.weight .*$", said, re.MULTILINE)
    assert row.split()[-5:-1].count("NaN") == 2, row


@pytest.mark.parametrize("kind", KINDS)
def test_tab_report_and_terminal_tell_one_story(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    watch = train(folder, kind)
    run, verdict = read_run(folder), watch.verdict()
    story = [(i.name or i.rule, i.first_step) for i, _ in rank_incidents(run.incidents)]
    assert (not story) == (kind == "healthy"), story

    # The tab, over its own reader.
    meta = run_folder_at(folder)
    assert meta is not None
    told, said = FolderRun(folder, tmp_path, meta).incidents()
    assert [(i["name"] or i["rule"], i["first_step"]) for i in told] == story

    # The terminal, at the end of the run and afterwards.
    assert live(watch) == story
    printed, rows = terminal(folder, capsys)
    assert rows == story

    # The report, in each of its forms.
    data = ReportData.from_run(run)
    summary = summarise(data)
    assert [s.name for s in summary.stories] == rules_of(story)
    page, markdown = to_html(data), to_markdown(data)
    names = {s.title: s.name for s in summary.stories}
    assert re.findall(r'<section class="gw-story [^>]*data-rule="([^"]*)"', page) == [s.rule for s in summary.stories]
    assert [names[t] for t in re.findall(r"^## \d+\. (.*)$", markdown.replace("\\", ""), re.MULTILINE)] == rules_of(
        story
    )

    # One verdict.
    assert verdict.state == said.state == run.verdict().state == summary.verdict.state
    assert verdict.headline == said.headline == run.verdict().headline
    assert verdict.headline in watch.summary()
    assert summary.headline in " ".join(printed.split())  # folded where a terminal is narrow
    assert f'"verdict": {{\n  "state": "{verdict.state}"' in to_json(data)

    # What the verdict names is what the report says to look at first, and both say since when.
    if story:
        assert said.first is not None
        looked_at = next((s for s in summary.stories if s.part == "first"), summary.stories[0])
        assert said.first in [(i.rule, i.first_step, i.id) for i in looked_at.incidents]
    if verdict.state == "not healthy":
        assert f"since step {verdict.since}:" in verdict.headline
        assert f"since step {verdict.since}." in summary.headline
