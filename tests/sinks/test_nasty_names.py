"""Nothing in a name bites: whatever modules, rules, tasks and runs are called, every writer and reader is safe."""

import csv
import io
import json
import logging
import re
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradwatch import GradwatchWarning, Watch
from gradwatch._text import file_name, printable
from gradwatch.callbacks._say import say
from gradwatch.cli import main
from gradwatch.cli._terminal import Grid, show_grid, show_lines
from gradwatch.records import Incident, Index, StepRecord
from gradwatch.report import report_text
from gradwatch.rules import Exploding
from gradwatch.runs import read_run
from gradwatch.sinks import CsvSink, TensorBoardSink
from gradwatch.sinks._csv import inert_cell
from gradwatch.sinks._text import escape
from gradwatch.sinks.tensorboard._values import clean_tag
from gradwatch.treatments import Checkpoint

from ..tab.conftest import Tab

NASTY = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\x1b[31mRED\x1b]0;pwn\x07", "=cmd|' ! C'!A0",
    "new\nline", "a\u202eb", "{{7*7}}", "javascript:alert(1)", "@SUM(1)", "\U0001f600", "[x](javascript:alert(3))",
    "`|x|`", "+1+1", "-2+3", "\ud800", "n" * 300, "a/b/c", "a\\b", "CON", "%s%n{0}", "\u2028", "&lt;", "![x](y)",
    "$\\frac$", "\x9b31m", "\x00", "x" * 50 + "\x1b[2J", "\t=1", "<!--", "]]>", "𝕏" * 100,
]  # fmt: skip

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey, and what no file in UTF-8 can hold."""


def trained(folder):
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in NASTY:
        net.add_module(name.replace(".", "") or "x", nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    writer = SummaryWriter(str(folder / "events"))
    sinks = [CsvSink(folder / "log.csv"), TensorBoardSink(writer)]
    rules = [Exploding(name=name[:300]) for name in NASTY]
    options = {"activations_every": 10, "histograms_every": 20, "log_every": 10}
    with Watch(net, optimizer, run_dir=folder / "run", sinks=sinks, rules=rules, **options) as watch:
        for i in range(70):
            loss = net(torch.randn(8, 4)).square().mean() * (1e8 if i == 60 else 1)
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
        for name in NASTY:
            watch.annotate(name)
    writer.close()
    return watch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nasty")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    log = logging.getLogger("gradwatch")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", GradwatchWarning)
            watch = trained(folder)
    finally:
        log.removeHandler(handler)
    return folder, watch, said.getvalue()


def test_training_goes_on_and_all_is_on_record_whatever_the_names(run):
    folder, watch, _ = run
    assert watch.session.sinks.failed == {}
    assert len(read_run(folder / "run")) == 70
    assert {i.name for i in read_run(folder / "run").incidents} == {i.name for i in watch.incidents}
    assert len(list((folder / "run").glob("flight-*.json"))) == min(len(watch.incidents), 30)


def test_no_line_for_a_terminal_holds_what_it_would_obey(run):
    folder, watch, logged = run
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        for command in ("summary", "replay", "watch --once", "compare", "report -o -", "report --format md -o -"):
            name, *options = command.split()
            others = [str(folder / "events")] if name == "compare" else []
            main([name, str(folder / "run"), *others, *options])
        show_lines([(name, "") for name in NASTY])
        grid = Grid(["a", "b"])
        grid.add(*NASTY[:2])
        show_grid(grid)
        for name in NASTY:
            say(name)
            main(["summary", str(folder / name.replace("\x00", ""))])
            main(["replay", str(folder / "run"), "--rules", name])
            main([name])
    for text in (out.getvalue(), logged, watch.summary()):
        assert text
        assert CONTROL.findall(text.replace("\n", "")) == []
    assert "new\nline" not in watch.summary()


def test_reports_hold_names_as_text(run):
    folder, watch, _ = run
    for form in ("html", "md"):
        watch.report(folder / f"report.{form}")
        text = (folder / f"report.{form}").read_text(encoding="utf-8")
        assert CONTROL.findall(text.replace("\n", "")) == []
        for bad in ("<img src=x", "</script><script>alert(2)", *(["](javascript:"] if form == "md" else [])):
            assert bad not in text, form
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"<[a-z!/]", page)
    outside_code = re.sub(r"`[^`\n]*`", "", page)
    assert not re.search(r"(?<!\\)!\[|(?<!\\)\]\(", outside_code)
    json.loads(report_text(read_run(folder / "run"), "json"))


def test_tables_for_spreadsheets_hold_no_formulas(run):
    folder, _, _ = run
    with (folder / "log.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [c for c in cells if c[:1] in "=+@" and c[1:2].isalpha()]
    assert [inert_cell(name) for name in ("=A1", "+1+1", "-2+3", "@SUM(1)", "\t=1")] == [
        "'=A1", "'+1+1", "'-2+3", "'@SUM(1)", "'\t=1",
    ]  # fmt: skip
    assert [inert_cell(cell) for cell in ("-1.5", "+2", -3.0, "nan", "step", "")] == [
        "-1.5",
        "+2",
        -3.0,
        "nan",
        "step",
        "",
    ]


def test_the_tab_shows_them_all(run):
    folder, watch, _ = run
    tab = Tab(folder)
    (source,) = (r["id"] for r in tab.json("/runs")["runs"])
    assert len(tab.json("/incidents", run=source)["incidents"]) == len(watch.incidents)
    assert tab.get("/matrix", run=source, statistic="grad_norm").status_code == 200


@pytest.mark.parametrize("route", ["/runs", "/run", "/matrix", "/headline", "/scalars", "/incidents", "/histograms"])
def test_odd_queries_of_the_tab_are_refused_or_mean_the_usual(run, route, caplog):
    tab = Tab(run[0])
    (source,) = (r["id"] for r in tab.json("/runs")["runs"])
    odd = ["", "-1", "1e400", "-inf", "inf", "nan", "1e18", "0x10", "../../etc/passwd", "%00", "a" * 5000, *NASTY[:3]]
    for value in odd:
        for key in ("run", "statistic", "path", "columns", "from", "to", "nothing"):
            query = {"run": source, "statistic": "grad_norm", key: value}
            assert tab.get(route, **query).status_code in (200, 404, 422), (key, value)
        assert tab.get("/static/" + value.replace("\x00", "")).status_code == 404
    assert [r for r in caplog.records if r.exc_info] == []


def test_a_file_name_is_one_short_part_of_a_path():
    for name in [*NASTY, "", ".", "..", "../x", ".hidden"]:
        safe = file_name(name)
        assert re.fullmatch(r"[\w.-]+", safe)
        assert not safe.startswith(".")
        assert len(safe.encode()) < 230
    assert len({file_name(name) for name in NASTY}) == len(NASTY)
    assert file_name("exploding-encoder") == "exploding-encoder"


def test_a_tag_is_printable_and_short_and_plain_ones_stay():
    for name in NASTY:
        tag = clean_tag(f"gradwatch log10 |gradient|/{name}")
        assert len(tag) < 220
        assert tag.isprintable()
        tag.encode()
    assert clean_tag("gradwatch/global_norm") == "gradwatch/global_norm"
    assert len({clean_tag(name) for name in NASTY}) == len(NASTY)


def test_random_names_survive_every_way_of_writing_them():
    rng = np.random.default_rng(0)
    letters = [*"ab<>[]()`|*_!#&;'\"=+-@/\\.:{}%$~\n\t", "\x1b", "\x07", "\u202e", "\ud800", "é", "𝕏", "\u2028", "\x85"]
    for _ in range(500):
        name = "".join(rng.choice(letters, int(rng.integers(1, 40))))
        assert CONTROL.search(printable(name).replace("\n", "")) is None
        told = escape(name)
        assert not re.search(r"(?<!\\)[<>*_`\[\]|]", told)
        assert "\n" not in told
        assert "/" not in file_name(name)
        incident = Incident(rule="a", name=name, first_step=1, last_step=2, value=1.0, limit=1.0, first_path=name,
                            paths=(name,), advice=name)  # fmt: skip
        index = Index.of_parameters([name])
        record = StepRecord(step=1, index=index, columns={"grad_norm": np.ones(1)})
        assert record["grad_norm", name] == 1
        assert Incident.from_json(json.loads(json.dumps(incident.to_json()))) == incident


def test_a_rule_of_any_name_asks_for_a_checkpoint_in_the_folder_alone():
    class Context:
        step = 3

        def request(self, request):
            self.filename = request.filename

    for name in NASTY:
        context = Context()
        Checkpoint().act(Incident(rule="a", name=name, first_step=1, last_step=2), context)
        assert re.fullmatch(r"[\w.-]+", context.filename)


def test_the_words_at_the_end_lie_in_a_run_folder_as_words(run):
    folder = run[0]
    page = (folder / "run" / "summary.md").read_text(encoding="utf-8")
    assert page.startswith("```\n")
    assert page.count("```") == 2  # nothing within ends the block of code
    assert CONTROL.findall(page.replace("\n", "")) == []
    assert page == f"```\n{read_run(folder / 'run').summary}\n```"
