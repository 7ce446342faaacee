"""Reports as HTML, markdown, JSON and PNG."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.errors import UnknownNameError
from gradwatch.records import Incident
from gradwatch.report import ReportData, Table, report_text, to_html, to_json, to_markdown, write_report
from gradwatch.report._bundle import bundle
from gradwatch.report._quantise import decode_table, encode_histograms, encode_table, encode_tables
from gradwatch.runs import read_run
from gradwatch.sinks import RunFolder
from tensorboard_plugin_gradwatch import MISSING, STATIC

from ..tab.synthetic import META, make_incidents, make_index, make_records

EVIL = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag if tag in self.inside else ""
        if self._open:
            self.inside[tag].append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open:
            self.inside[self._open][-1] += data


def test_written_files_have_the_form_of_their_ending(folder, tmp_path):
    for ending, begins in (
        (".html", b"<!DOCTYPE html>"),
        (".md", b"# gradwatch: spike"),
        (".json", b"{"),
        (".png", b"\x89PNG"),
    ):
        path = write_report(folder, tmp_path / "deep" / f"r{ending}")
        assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize("ending", ["html", "md", "json"])
def test_numpy_set_to_raise_ends_no_report(ending, tmp_path):
    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules="observe") as watch:
        for size in (1.0, 1e-44, 1e30):
            model.weight.grad, model.bias.grad = torch.full((1, 2), size), torch.zeros(1)
            watch.after_backward(loss=size**2)
            watch.after_step()
    with np.errstate(all="raise"):
        assert watch.report(tmp_path / f"report.{ending}").stat().st_size > 0


def test_form_asked_for_wins_over_the_ending(data, tmp_path):
    assert write_report(data, tmp_path / "r.txt", format="md").read_text().startswith("# gradwatch")


def test_unknown_form_is_refused(data, tmp_path):
    with pytest.raises(UnknownNameError, match=r"there is no report format 'pdf'\. Known: html, json, md, png\."):
        write_report(data, tmp_path / "r.pdf", format="pdf")


def test_html_lets_nothing_in_but_its_own_script_and_style(data):
    page = to_html(data)
    elements = Elements(page)
    policy = next(
        a["content"] for t, a in elements.found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    _, script = elements.inside["script"]
    (style,) = elements.inside["style"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{hashes[0]}';" in policy
    assert f"style-src 'sha256-{hashes[1]}';" in policy
    assert not [a for _, a in elements.found for name in a if name in ("src", "href", "style") or name.startswith("on")]


def test_hostile_names_are_text_everywhere():
    index = make_index(2)
    hostile = replace(index, paths=tuple(p.replace("h.1", EVIL) for p in index.paths))
    records = [replace(r, index=hostile, histograms={}) for r in make_records(blocks=2, steps=5)]
    incident = Incident(
        rule=EVIL, name=EVIL, first_step=1, last_step=1, paths=(EVIL,), first_path=EVIL, advice=EVIL, message=EVIL
    )
    data = ReportData.from_records(records, (incident,), name=EVIL, meta={"model": EVIL}, notes=(EVIL,))
    page = to_html(data)
    clean = to_html(replace(data, name="x", incidents=()))
    elements = Elements(page)
    assert [t for t, _ in elements.found].count("script") == [t for t, _ in Elements(clean).found].count("script") == 2
    assert "img" not in [t for t, _ in elements.found]
    assert json.loads(elements.inside["script"][0])["incidents"][0]["advice"] == EVIL
    markdown = to_markdown(data)
    assert "<script" not in re.sub(r"`[^`\n]*`", "", markdown.replace("\\<", ""))
    assert json.loads(to_json(data))["incidents"][0]["rule"] == EVIL


@pytest.mark.slow
def test_html_stays_under_500_kb_at_500_layers_and_2000_steps():
    rng = np.random.default_rng(0)
    index = make_index(blocks=125)  # 502 weights, 1,002 parameters with their biases
    is_parameter = index.is_parameter
    full = np.where(is_parameter, np.exp(rng.normal(-4, 1, len(index)) + rng.normal(0, 0.3, (2000, 1))), MISSING)
    sampled = dict.fromkeys(("update_ratio", "param_norm", "zero_fraction", "grad_absmax"), full[::50])
    tables = {"grad_norm": (np.arange(2000), full)} | {n: (np.arange(0, 2000, 50), v) for n, v in sampled.items()}
    data = ReportData(
        index=index,
        tables={
            n: Table(s[:1200].astype(float), v[:1200].astype(np.float32), len(s), 1999) for n, (s, v) in tables.items()
        },
        histograms={p: (np.arange(20), rng.poisson(3, (20, 512))) for p in index.paths if p.endswith("weight")},
        incidents=make_incidents(),
        num_steps=2000,
    )
    page = to_html(data)
    tables = json.loads(Elements(page).inside["script"][0])["tables"]
    assert len(page.encode()) < 500_000
    assert len(tables["grad_norm"]["steps"]) > 150


def test_json_gives_the_story_to_programs(data):
    told = json.loads(to_json(data))
    assert (told["state"], told["schema"], told["steps"]["recorded"]) == ("critical", 1, 400)
    assert [s["rule"] for s in told["stories"]] == ["exploding", "non_finite", "vanishing"]
    assert [s["part"] for s in told["stories"]] == ["handled", "handled", "first"]
    assert told["treatments"][0] == {
        "name": "clip_to_limit", "rule": "exploding", "count": 4, "first_step": 240, "last_step": 243,
        "least_share": pytest.approx(0.004, rel=0.3),
    }  # fmt: skip
    layer = next(r for r in told["layers"] if r["path"] == "h.4.mlp.c_fc.weight")
    assert (layer["largest"], layer["num_nonfinite"]) == ("nan", 1)


def test_markdown_tells_the_first_cause_first(data):
    text = to_markdown(data)
    assert text.index("## 1. The gradient exploded") < text.index("## 3. The gradient vanishes")
    assert "| `h.0.mlp.c_fc.weight` |" in text
    assert report_text(data, "md") == text


def test_live_records_give_the_same_report_as_the_run_folder(data):
    live = ReportData.from_records(make_records(), make_incidents(), name="spike")
    assert set(live.tables) == set(data.tables)
    for name, table in live.tables.items():
        np.testing.assert_array_equal(table.values, data.tables[name].values)
    assert live.treatments == data.treatments
    assert set(live.histograms) == set(data.histograms)
    assert live.num_skipped == data.num_skipped == 1


@pytest.mark.parametrize("of_folder", [False, True])
def test_the_alarms_bar_is_drawn_at_every_step_and_a_clips_limit_where_it_acted(of_folder, tmp_path):
    records = [replace(r, scalars={**r.scalars, "limit": 3.0}) for r in make_records(steps=250)]
    stated = {r.step: t.values["limit"] for r in records for t in r.treatments if "limit" in t.values}
    assert stated
    if of_folder:
        sink = RunFolder(tmp_path / "run")
        sink.open(META)
        for record in records:
            sink.write(record, [record])
        sink.close()
        found = ReportData.from_run(read_run(tmp_path / "run"))
    else:
        found = ReportData.from_records(records)
    steps, bars = found.scalars["limit"]
    assert steps.tolist() == list(range(250))
    assert bars.tolist() == [3.0] * 250
    steps, limits = found.scalars["clip_limit"]
    assert dict(zip(steps.tolist(), limits.tolist(), strict=True)) == stated


def test_report_of_nothing_is_still_a_report(tmp_path):
    for ending in ("html", "md", "json"):
        assert write_report(ReportData(), tmp_path / f"r.{ending}").stat().st_size


@pytest.mark.parametrize("bits", [8, 16])
def test_quantised_table_is_within_half_a_code_and_keeps_what_is_special(bits):
    values = np.float32([[1e-9, 0.0, np.nan, MISSING], [2e3, np.inf, 1.0, 0.5]])
    table = Table(np.array([0.0, 1.0]), values, 2, 1.0)
    back = decode_table(encode_table(table, np.arange(4), 10, bits))
    finite = np.isfinite(values) & (values > 0)
    np.testing.assert_array_equal(back[~finite], values[~finite])
    half = 0.5 * np.log10(2e12) / (2**bits - 5)
    assert np.abs(np.log10(back[finite]) - np.log10(values[finite])).max() <= half * 1.001


def test_tables_of_one_size_have_no_range_to_divide_by():
    table = Table(np.array([0.0]), np.float32([[0.25, 0.25]]), 1, 0.0)
    np.testing.assert_allclose(decode_table(encode_table(table, np.arange(2), 10, 8)), 0.25, rtol=1e-6)


def test_budget_is_kept_by_pooling():
    rng = np.random.default_rng(1)
    table = Table(np.arange(1000.0), rng.random((1000, 100)).astype(np.float32), 1000, 999)
    packed = encode_tables([("a", table, np.arange(100)), ("b", table, np.arange(100))], 60_000)
    assert sum(len(p["data"]) for p in packed.values()) < 60_000
    assert packed["a"]["measured"] == 1000


def test_histograms_of_incidents_come_before_those_of_others():
    rng = np.random.default_rng(2)
    many = {f"p{i}": (np.arange(30), rng.integers(0, 99, (30, 512))) for i in range(80)}
    packed = encode_histograms(many, ["p70"], 20_000)
    assert "p70" in packed["paths"]


def test_bundle_holds_every_module_once_and_no_import():
    script = bundle("report.js")
    assert len(re.findall(r"^const \$dom_js = ", script, re.MULTILINE)) == 1
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    assert "</script" not in script.lower()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param("import './x.js';\n", "don't know how to bundle", id="bare-import"),
        pytest.param("export let a = 1, b = 2;\nexport {a};\n", "don't know how to bundle", id="export-list"),
        pytest.param("import {a} from './odd.js';\n", "imports itself", id="circle"),
        pytest.param("const x = '</script>';\n", "would end or disturb", id="script-end"),
    ],
)
def test_bundle_refuses_modules_of_another_form(tmp_path, monkeypatch, source, said):
    (tmp_path / "odd.js").write_text(source)
    monkeypatch.setattr("gradwatch.report._bundle.STATIC", tmp_path)
    bundle.cache_clear()
    with pytest.raises(ValueError, match=said):
        bundle("odd.js")


def test_vendored_licence_is_in_the_page(data):
    assert "Permission is hereby granted" in to_html(data)
    assert (STATIC / "vendor" / "LICENSE-uPlot").exists()
