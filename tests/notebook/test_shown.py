"""What a notebook shows of each object: HTML in which nothing out of a run is markup, and text that reads as text."""

from __future__ import annotations

import contextlib
import copy
import enum
import importlib
import inspect
import pickle
import pkgutil
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Watch
from gradwatch._markup import Text
from gradwatch.notebook import RunCard, Series
from gradwatch.records import Incident, Incidents, Index, StepRecord, judge_run
from gradwatch.report import ReportData, summarise
from gradwatch.runs import read_run, replay

NASTY = "<script>alert(1)</script>\"'&\x1b[2J"


class Elements(HTMLParser):
    """The tags of a page, which must close in the order in which they opened; its text; its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class Printer:
    """What IPython hands to `_repr_pretty_`."""

    def __init__(self) -> None:
        self.said = ""

    def text(self, words: str) -> None:
        self.said += words


def printed(shown) -> str:
    printer = Printer()
    shown._repr_pretty_(printer, False)
    return printer.said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A watch that has seen a spike and a step of NaN, and its run folder."""
    folder = tmp_path_factory.mktemp("run") / "1"
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    with Watch(net, optimizer, run_dir=folder, rules="autoclip") as watch:
        for step in range(160):
            loss = (net(torch.randn(16, 8)) - 1).square().mean() * (1e4 if step == 100 else 1.0)
            loss = loss * float("nan") if step == 130 else loss
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch, folder


def shown_of(watch, folder):
    run = read_run(folder)
    batch = torch.randn(16, 8), torch.randn(16, 1)
    return {
        "watch": watch,
        "summary": watch.summary(),
        "incidents": watch.incidents,
        "incident": watch.incidents[0],
        "no incidents": Incidents(),
        "record": watch.history[100],
        "verdict": watch.verdict(),
        "case": watch.incidents[0].case,
        "report": summarise(ReportData.from_run(run)),
        "run": run,
        "incidents of a run": run.incidents,
        "replay": replay(run, "default"),
        "preflight": gradwatch.preflight(nn.Linear(8, 1), batch, nn.MSELoss()),
    }


def test_every_object_is_shown_as_sound_html_without_scripts_and_as_text(trained) -> None:
    for name, shown in shown_of(*trained).items():
        page = Elements(shown._repr_html_())
        assert page.text, name
        assert not {"script", "style", "link", "iframe"} & set(page.tags), name
        assert not any(key.startswith("on") for key, _ in page.attributes), name
        # Nothing is fetched: pictures stand in their own address.
        assert all(value.startswith("data:image/") for key, value in page.attributes if key in ("src", "href"))
        if hasattr(shown, "_repr_pretty_"):
            assert "<" not in printed(shown).replace("<lambda>", ""), name


# Of what gradwatch writes, what JupyterLab's sanitizer (@jupyterlab/apputils 4.6) leaves of a notebook that is not
# trusted, because it was run elsewhere.
KEPT_TAGS = {
    "b",
    "code",
    "details",
    "div",
    "img",
    "pre",
    "span",
    "summary",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
}
KEPT_STYLES = {
    *("border-collapse", "border-left", "border-top", "display", "flex-direction", "flex-shrink", "font-size"),
    *("font-weight", "height", "justify-content", "line-height", "margin", "max-width", "min-width", "opacity"),
    *(
        "overflow-wrap",
        "overflow-x",
        "padding",
        "padding-left",
        "padding-right",
        "text-align",
        "vertical-align",
        "width",
    ),
}
DISPENSABLE = {"image-rendering"}
"""A picture that is drawn out is smooth instead of sharp."""


def test_a_notebook_that_is_not_trusted_loses_nothing(trained) -> None:
    for name, shown in shown_of(*trained).items():
        page = Elements(shown._repr_html_())
        assert set(page.tags) <= KEPT_TAGS, name
        styles = [part for key, value in page.attributes if key == "style" for part in value.split(";") if part]
        assert {part.partition(":")[0].strip() for part in styles} <= KEPT_STYLES | DISPENSABLE, name


def test_a_notebook_s_plain_text_is_words_and_no_dump_of_fields(trained) -> None:
    """As IPython itself finds them: it takes a class's own `__repr__` before what its base says."""
    shows = pytest.importorskip("IPython.core.formatters").PlainTextFormatter()
    for name, shown in shown_of(*trained).items():
        text = shows(shown)
        assert text == printed(shown), name
        assert not re.search(r"\b(severity|paths|findings|coverage|message)=", text), name
    assert shows(read_run(trained[1])).splitlines()[1] == str(trained[0].verdict())


def classes_with_words() -> list[type]:
    """Every class of gradwatch's that says what `str` makes of it."""
    modules = []
    for module in pkgutil.walk_packages(gradwatch.__path__, "gradwatch."):
        with contextlib.suppress(ModuleNotFoundError):  # what needs a package that is not installed here
            modules += [importlib.import_module(module.name)] if "__main__" not in module.name else []
    found = {
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__.startswith("gradwatch") and "__str__" in vars(cls)
    }
    return sorted(
        (c for c in found if not issubclass(c, (BaseException, str, enum.Enum))), key=lambda c: c.__qualname__
    )


def test_what_has_words_of_its_own_is_shown_in_them() -> None:
    classes = classes_with_words()
    assert {"Incident", "CaseFile", "PreflightReport", "Health", "Summary"} <= {c.__name__ for c in classes}
    for cls in classes:
        assert "_repr_pretty_" in vars(cls) or vars(cls).get("__repr__") is vars(cls)["__str__"], cls


def test_watch_and_its_run_show_the_same_story(trained) -> None:
    watch, folder = trained
    live, read = Elements(watch._repr_html_()).text, Elements(read_run(folder)._repr_html_()).text
    ranked = [i for i, _ in gradwatch.records.rank_incidents(watch.incidents)]
    assert len(ranked) >= 2
    for text in (live, read):
        places = [text.index(incident.seen) for incident in ranked]
        assert places == sorted(places)
        assert str(watch.verdict()) in text
        assert "0.weight" in text


def curves_of(page: Elements) -> list[str]:
    """Return what is said of each picture of lines."""
    return [value for key, value in page.attributes if key == "alt" and " from step " in value]


def drawn(html: str) -> str:
    """Return the first picture of lines, as SVG."""
    return b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", html)[1]).decode()


def test_drawings_have_words_for_those_who_do_not_see_them(trained) -> None:
    page = Elements(trained[0]._repr_html_())
    assert curves_of(page) == ["loss from step 0 to 159", "global gradient norm from step 0 to 159"]
    assert page.tags.count("img") == sum(key == "alt" and bool(value) for key, value in page.attributes)


def test_norms_that_are_one_are_drawn_once_and_nan_throughout_is_drawn_too() -> None:
    index = Index.of_parameters(["w"])
    for loss, norms in ((1.0, (2.0, 2.0)), (float("nan"), (float("nan"), float("nan")))):
        records = [
            StepRecord(step=i, index=index, loss=loss, global_norm=norms[0], scalars={"global_norm_applied": norms[1]})
            for i in range(60)
        ]
        page = Elements(RunCard.of(judge_run(), Series(records), ()).html())
        assert curves_of(page) == ["loss from step 0 to 59", "global gradient norm from step 0 to 59"]
        assert ("as the optimizer got it" in page.text) == np.isnan(loss)


def test_names_out_of_a_run_are_text_and_nothing_else() -> None:
    incident = Incident(
        rule=NASTY, first_step=3, last_step=4, paths=(NASTY,), first_path=NASTY, message=NASTY, advice=NASTY
    )
    index = Index.of_parameters([NASTY])
    record = StepRecord(step=0, index=index, global_norm=1.0, columns={"grad_norm": np.ones(1)}, scalars={NASTY: 1.0})
    for shown in (incident, Incidents([incident]), record, Text(NASTY)):
        page = Elements(shown._repr_html_())
        assert "script" not in page.tags
        assert "<script>alert(1)</script>" in page.text
        assert "\x1b" not in shown._repr_html_() + printed(shown if not isinstance(shown, Text) else incident)


def test_a_record_says_what_it_measured_and_tells_nan_from_not_measured() -> None:
    index = Index.of_parameters(["a", "b", "c"])
    record = StepRecord(
        step=1200,
        index=index,
        loss=float("nan"),
        global_norm=float("inf"),
        columns={"grad_norm": np.array([np.nan, 0.25, 7.0])},
        masks={"grad_norm": np.array([True, True, False])},
    )
    cells = re.findall(r"<td[^>]*>(.*?)</td>", record._repr_html_())
    assert cells[:6] == ["<code>a</code>", "NaN", "<code>b</code>", "0.25", "<code>c</code>", "-"]
    assert str(record).startswith("step 1,200, loss NaN\nglobal gradient norm: ∞ as produced\n")
    assert repr(record) == "StepRecord(step=1200, loss=nan, global_norm=inf, 3 paths)"


def test_a_summary_is_text_in_every_other_respect(trained) -> None:
    summary = trained[0].summary()
    assert summary == str(summary)
    assert type(pickle.loads(pickle.dumps(summary))) is str
    assert type(copy.deepcopy(summary)) is str
    assert printed(summary) == str(summary)
    assert summary._repr_html_() == trained[0]._repr_html_()


def test_incidents_are_a_list_in_every_other_respect(trained) -> None:
    incidents = trained[0].incidents
    assert incidents == list(incidents)
    assert str(pickle.loads(pickle.dumps(incidents))) == str(incidents)
    assert str(Incidents()) == "no incidents"


def records_of(losses, index):
    return [StepRecord(step=i, index=index, loss=loss, global_norm=1.0) for i, loss in enumerate(losses)]


def test_points_of_a_long_run_keep_the_one_spike_and_the_one_nan() -> None:
    losses = np.ones(5000)
    losses[1234], losses[4321] = 99.0, np.nan
    series = Series(records_of(losses, Index.of_parameters(["w"])))
    assert 240 <= len(series) <= 480
    loss = series.curve("loss")
    assert np.nanmax(loss) == 99.0
    assert np.isnan(loss).sum() == 1
    assert series.steps[np.nanargmax(loss)] <= 1234 < series.steps[np.nanargmax(loss) + 1]
    assert series.steps[np.isnan(loss)][0] <= 4321


@pytest.mark.parametrize(("largest", "middle"), [(8.0, "low"), (1e12, "high")])
def test_a_loss_that_blows_up_leaves_the_steps_before_it_in_sight(largest, middle) -> None:
    """Drawn linearly, 1e6 is nothing beside 1e12."""
    losses = np.full(60, 1.0)
    losses[30:] = 1.0 if largest == 8 else 1e6
    losses[-1] = largest
    series = Series(records_of(losses, Index.of_parameters(["w"])))
    html = RunCard(headline="a run", tone="good", series=series).html()
    heights = [
        float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'<path d="(M[^"]+h[^"]+)"', drawn(html))[1])
    ]
    share = (heights[0] - heights[40]) / (heights[0] - heights[-1])
    assert (share > 0.4) == (middle == "high")


def test_a_run_read_and_a_run_in_memory_draw_the_same_points(trained) -> None:
    watch, folder = trained
    live = Series(watch.history)
    run = read_run(folder)
    read = Series.over(run.steps(), run.index)
    for name in ("loss", "global_norm", "global_norm_applied"):
        read.put(name, *run.scalar(name))
        np.testing.assert_array_equal(live.curve(name), read.curve(name))
    for part in run.parts("grad_norm"):
        read.put_norms(*part)
    np.testing.assert_array_equal(live.norms, read.norms)
    np.testing.assert_array_equal(live.steps, read.steps)


@pytest.mark.parametrize("num_steps", [480, 481, 960, 961, 5000])
def test_points_do_not_depend_on_whether_records_came_one_by_one(num_steps) -> None:
    index, losses = Index.of_parameters(["w"]), np.random.default_rng(0).random(num_steps)
    live, read = Series(records_of(losses, index)), Series.over(np.arange(num_steps), index)
    read.put("loss", np.arange(num_steps), losses)
    assert live.steps.tolist() == read.steps.tolist()
    assert live.curve("loss").tolist() == read.curve("loss").tolist()


def test_steps_taken_again_replace_those_taken_before() -> None:
    index = Index.of_parameters(["w"])
    series = Series(records_of(np.full(10, 5.0), index))
    for record in records_of(np.full(8, 1.0), index)[4:]:
        series.add(record)
    assert series.steps.tolist() == list(range(8))
    assert series.curve("loss").tolist() == [5.0] * 4 + [1.0] * 4
    assert series.last_step == 7


def test_a_layer_that_comes_or_goes_is_a_gap_and_no_error() -> None:
    one, two = Index.of_parameters(["a", "b"]), Index.of_parameters(["b", "c"])
    columns = {"grad_norm": np.array([1.0, 2.0])}
    records = [StepRecord(step=0, index=one, columns=columns), StepRecord(step=1, index=two, columns=columns)]
    series = Series(replace(r, global_norm=1.0, loss=1.0) for r in records)
    assert series.layers == ["a", "b"]
    assert series.norms.tolist() == [[1.0, 2.0], [-np.inf, 1.0]]


def test_nothing_measured_is_a_card_that_says_so() -> None:
    net = nn.Linear(2, 1)
    with Watch(net, torch.optim.SGD(net.parameters(), 0.1)) as watch:
        page = Elements(watch._repr_html_())
    assert "Not enough seen" in page.text
    assert "img" not in page.tags
