"""One of three verdicts, the same at every door; nobody calls a run healthy of which not enough was seen."""

import csv
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from gradwatch import ConfigError, Watch
from gradwatch.callbacks import GradWatch
from gradwatch.cli import FINE, FOUND, UNSEEN, main
from gradwatch.records import Incident, RuleCoverage, judge_run
from gradwatch.report import report_text
from gradwatch.rules import Exploding, NonFinite
from gradwatch.runs import compare, read_log, read_run, replay
from gradwatch.sinks import RunFolder, TensorBoardSink
from gradwatch.treatments import ClipToLimit, SkipStep

from ..tab.conftest import Tab

HEALTHY, NOT_HEALTHY, NOT_ENOUGH = "healthy", "not healthy", "not enough seen"


class Mine(Exploding):
    """A rule that raises."""

    def judge(self, record, state):
        raise ValueError("boom")


class Full(RunFolder):
    """A run folder on a disk that is full from a step on."""

    def write(self, record, window=()):
        if record.step >= 60:
            raise OSError(28, "No space left on device")
        super().write(record, window)


def train(folder: Path, steps: int, *, spike: int | None = None, ending=None, nothing=False, run_dir=True, **options):
    """Train a small model under a watch that writes a run folder and event files; return the watch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    true = torch.randn(8, 1)
    writer = SummaryWriter(str(folder / "events"))
    sinks = [TensorBoardSink(writer), *options.pop("sinks", ())]
    run_dir = folder / "run" if run_dir else None
    watch = Watch(net, optimizer, run_dir=run_dir, sinks=sinks, log_every=10, **options)
    for i in range(steps):
        x = torch.randn(32, 8)
        loss = (net(x) - x @ true).square().mean() * (1e6 if i == spike else 1)
        loss.backward()
        if nothing:
            optimizer.step()
        else:
            watch.step(loss=loss)
        optimizer.zero_grad()
    if ending is not None:
        watch.__exit__(type(ending), ending, None)
    else:
        watch.close()
    writer.close()
    return watch


def log_of(folder: Path, watch: Watch) -> None:
    with (folder / "log.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss", "grad_norm"])
        rows.writerows([r.step, r.loss, r.global_norm] for r in watch.history)


def spoken_of(folder: Path, watch: Watch | None, capsys) -> dict[str, str]:
    """Return what every public reader says of a run, by reader."""
    run = folder / "log.csv" if (folder / "log.csv").exists() else folder / "run"
    said: dict[str, str] = {}
    commands = {
        "summary": [str(run)],
        "summary --json": [str(run), "--json"],
        "replay": [str(run)],
        "replay --json": [str(run), "--json"],
        "compare": [str(run), str(folder / "other")],
        "watch": [str(run), "--once"],
        "watch --json": [str(run), "--once", "--json"],
        "report -o r.html": [str(run), "-o", str(folder / "r.html")],
        "report --json": [str(run), "-o", str(folder / "s.html"), "--json"],
    }
    if not (folder / "other").exists() and (folder / "run").is_dir():
        shutil.copytree(folder / "run", folder / "other")
    for name, arguments in commands.items():
        capsys.readouterr()
        main([name.split()[0], *arguments])
        out = capsys.readouterr()
        said[name] = out.out + out.err
    opened = None
    if run.exists():
        try:
            opened = read_log(run) if run.suffix == ".csv" else read_run(run)
        except gradwatch.GradwatchError:
            opened = None
    if opened is not None:
        said |= {
            f"report.{form}": report_text(gradwatch.report.ReportData.from_run(opened), form)
            for form in ("html", "md", "json")
        }
        said |= {"verdict": str(opened.verdict()), "run": opened._repr_html_(), "path": str(gradwatch.verdict(run))}
        said |= {"compare()": str(compare(opened, opened)), "replay()": replay(opened, "default")._repr_html_()}
    if watch is not None:
        watch.report(folder / "live.html")
        said |= {
            "live": watch.summary(),
            "notebook": watch._repr_html_(),
            "live.html": (folder / "live.html").read_text(),
        }
        said["watched"] = str(gradwatch.verdict(watch))
    if (folder / "events").is_dir():
        tab = Tab(folder)
        said["tab"] = json.dumps([tab.json("/incidents", run=r["id"]) for r in tab.json("/runs")["runs"]])
    return said


def claims(text: str) -> list[str]:
    """Return where a text says healthy, but not "not healthy"."""
    found = re.finditer(r"(?<!not )(?<!not-)\bhealthy\b", text, re.I)
    return [text[max(0, m.start() - 60) : m.end() + 40] for m in found]


def observe_only(folder):
    return train(folder, 120, rules="observe")


def few_steps(folder):
    return train(folder, 24)


def few_steps_of_one_rule(folder):
    return train(folder, 24, rules=[NonFinite()])


def crashed(folder):
    return train(folder, 120, ending=ValueError("no"))


def interrupted(folder):
    return train(folder, 120, ending=KeyboardInterrupt())


def failed_recording(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(folder, 120, run_dir=False, sinks=[Full(folder / "run")])


def killed(folder):
    """What SIGKILL leaves: the folder as it stood in the midst of the run."""
    torch.manual_seed(0)
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    with Watch(net, optimizer, run_dir=folder / "alive") as watch:
        for _ in range(120):
            loss = (net(torch.randn(32, 8))).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
        shutil.copytree(folder / "alive", folder / "run")
    shutil.rmtree(folder / "alive")


def damaged(folder):
    """A whole run, of which the record files are gone."""
    train(folder, 120)
    for file in (folder / "run").glob("records-*"):
        file.unlink()
    shutil.rmtree(folder / "events")


def a_rule_raised(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(folder, 120, rules=[Mine(name="mine"), NonFinite()])


def nothing_stepped(folder):
    return train(folder, 20, nothing=True)


def foreign_log(folder):
    log_of(folder, train(folder, 120, rules="observe"))


def empty_folder(folder):
    (folder / "run").mkdir()


CASES = [observe_only, few_steps, few_steps_of_one_rule, crashed, interrupted, killed, damaged, failed_recording,
         a_rule_raised, nothing_stepped, foreign_log, empty_folder]  # fmt: skip


LIKE_OTHERS = [few_steps_of_one_rule, interrupted, nothing_stepped]
"""Another stands for them where time is short."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.__name__, marks=[pytest.mark.slow] if case in LIKE_OTHERS else []) for case in CASES],
)
def test_no_reader_calls_a_run_healthy_of_which_not_enough_was_seen(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "of"
    folder.mkdir()
    watch = case(folder)
    with warnings.catch_warnings():
        if case is damaged:
            warnings.simplefilter("ignore")  # every reader tells of it
        spoken = spoken_of(folder, watch, capsys)
    for reader, text in spoken.items():
        # A replay judges anew: of a whole run that nobody judged, by rules that could.
        if reader.startswith("replay") and case in (observe_only, a_rule_raised):
            continue
        assert claims(text) == [], reader
        assert "no incidents" not in text, reader


def test_a_run_that_was_seen_well_is_healthy_at_every_door_in_the_same_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    watch = train(tmp_path, 200)
    told = watch.verdict().headline
    assert re.fullmatch(r"Healthy: \d\d rules judged 200 steps, and none fired\.", told)
    for reader, text in spoken_of(tmp_path, watch, capsys).items():
        if "--json" not in reader or reader != "report --json":
            assert told in " ".join(text.split()) or told.rstrip(".") in " ".join(text.split()), (reader, text[:300])
    assert {"exploding", "not_learning"} <= set(watch.verdict().judged)
    assert watch.verdict().unjudged["overfit"] == "`val_loss` was not given"


def test_a_handled_incident_reads_as_handled(tmp_path):
    watch = train(tmp_path, 200, spike=160, rules=[Exploding(then=ClipToLimit()), NonFinite(then=SkipStep())])
    over = watch.incidents[0].resolved_step
    assert watch.verdict().headline == f"Healthy: one incident, treated at 160, over at {over}."
    assert read_run(tmp_path / "run").verdict().headline == watch.verdict().headline
    assert replay(read_run(tmp_path / "run"), watch.session.settings.book).verdict().state == HEALTHY


def test_an_incident_that_nothing_was_done_about_is_not_healthy_though_it_is_over(tmp_path):
    watch = train(tmp_path, 200, spike=160)
    assert watch.verdict().state == NOT_HEALTHY
    assert watch.verdict().headline.startswith("Not healthy since step 160: exploding in ")


def test_what_is_missing_is_said_in_one_line(tmp_path):
    told = train(tmp_path, 24).verdict()
    assert told.state == NOT_ENOUGH
    assert "24 steps on record, 50 are the least" in told.headline
    assert "exploding (judged 4 times, 20 are needed)" in told.headline
    assert "diverging (fewer than 30 losses)" in told.headline
    assert "\n" not in told.headline


def test_a_rule_that_raised_failed_and_did_not_lack_anything(tmp_path):
    watch = a_rule_raised(tmp_path)
    assert "a rule failed: mine (ValueError: boom)" in watch.verdict().headline
    assert "rules that failed: mine (ValueError: boom)" in watch.summary()
    # Beside those that it names as failed none is counted that lacked nothing.
    idle = [c for c in watch.verdict().coverage if not c.judged and c.reason and not c.disabled]
    told = re.findall(r"(\d+) of \d+ rules had nothing to judge", watch.summary())
    assert told == ([str(len(idle))] if idle else [])
    assert read_run(tmp_path / "run").verdict().unjudged["mine"] == "failed: ValueError: boom"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (observe_only, "no rule was asked to judge"),
        (crashed, "crashed"),
        (interrupted, "interrupted"),
        (failed_recording, "recording failed (OSError: [Errno 28] No space left on device)"),
        (nothing_stepped, "nothing was recorded"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_why_not_enough_was_seen(tmp_path, case, words):
    assert words in case(tmp_path).verdict().headline


def test_a_run_that_goes_on_is_healthy_so_far_at_most(tmp_path):
    net = nn.Linear(4, 1)
    watch = Watch(net, torch.optim.SGD(net.parameters(), 1e-2), rules=[NonFinite()])
    with watch:
        for _ in range(60):
            loss = net(torch.randn(8, 4)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            watch.optimizers[0].zero_grad()
        assert watch.verdict().headline == "Healthy so far: one rule judged 60 steps, and none fired."


def test_a_callback_that_never_trained_has_seen_nothing():
    assert gradwatch.verdict(GradWatch()).state == NOT_ENOUGH


def test_exit_codes_tell_the_three_apart(tmp_path):
    for name, options in {"well": {}, "ill": {"spike": 160}, "short": {}}.items():
        train(tmp_path / name, 24 if name == "short" else 200, **options)
    for command in (["summary"], ["report"], ["watch", "--once"], ["replay"]):
        codes = {
            n: main([*command, str(tmp_path / n / "run"), "--fail-on", "warning"]) for n in ("well", "ill", "short")
        }
        assert codes == {"well": FINE, "ill": FOUND, "short": UNSEEN}, command
        assert main([*command, str(tmp_path / "short" / "run"), "--fail-on", "never"]) == FINE


def test_what_is_no_run_has_no_verdict(tmp_path):
    for given in (3, None, Watch, tmp_path / "none"):
        with pytest.raises(ConfigError):
            gradwatch.verdict(given)


def test_a_verdict_survives_what_carries_it():
    entry = RuleCoverage(name="a", judged=3, reason="x", seen=9, enough=5, is_core=False, strip=(0.0, 0.5, 1.0))
    carried = RuleCoverage.from_json(json.loads(json.dumps(entry.to_json())))
    assert carried == entry
    assert carried.strip == entry.strip
    for damaged in (None, 3, {}, {"name": 3}, {"name": "a", "judged": "many"}, {"name": "a", "strip": 3}):
        assert RuleCoverage.from_json(damaged) is None


def test_of_optimizers_that_are_judged_apart_the_one_of_which_less_was_seen_speaks():
    both = [RuleCoverage(name="a", judged=n, enough=20) for n in (400, 3)]
    assert judge_run(coverage=both, num_steps=400).state == NOT_ENOUGH


def test_a_treatment_that_failed_is_no_handled_incident():
    failed = Incident(rule="treatment_failed", first_step=3, last_step=3, severity="critical", treatments=("zclip",),
                      resolved=True, resolved_step=3)  # fmt: skip
    told = judge_run(incidents=[failed], coverage=[RuleCoverage(name="a", judged=400)], num_steps=400)
    assert told.state == NOT_HEALTHY


def test_who_was_only_told_did_nothing_about_it():
    told_of = Incident(rule="a", first_step=3, last_step=3, treatments=("notify", "checkpoint"), resolved=True,
                       resolved_step=30)  # fmt: skip
    told = judge_run(incidents=[told_of], coverage=[RuleCoverage(name="a", judged=400)], num_steps=400)
    assert told.state == NOT_HEALTHY
