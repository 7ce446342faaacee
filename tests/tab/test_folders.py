"""The tab over run folders: every step of a run, beside event files or without them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from gradwatch.protocols import RunMeta
from gradwatch.records import rank_incidents
from gradwatch.runs import read_run
from gradwatch.sinks import RunFolder, TensorBoardSink
from tensorboard_plugin_gradwatch import MISSING
from tensorboard_plugin_gradwatch._folders import Folders
from tensorboard_plugin_gradwatch._shown import FACTOR, Levels, Table
from tensorboard_plugin_gradwatch._wire import unpack

from .synthetic import META, make_incidents, make_index, make_records, write_events, write_folder


def matrix(tab, run, **query):
    response = tab.get("/matrix", run=run, **{"statistic": "grad_norm", "columns": 0, **query})
    assert response.status_code == 200, response.text
    return unpack(response.data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_folder(root / "1")
    return root


def test_a_run_folder_alone_is_a_run_of_the_tab(folder, open_tab):
    tab = open_tab(folder)
    assert tab.plugin.is_active()
    assert [(r["id"], r["message"]) for r in tab.json("/runs")["runs"]] == [("1", "")]
    run = tab.json("/run", run="1")
    assert run["index"] == make_index().to_json()
    assert run["statistics"]["grad_norm"] == {"over": "parameter"}
    assert run["statistics"]["output_rms"] == {"over": "module"}
    assert run["meta"]["model"] == "GPT"
    assert run["has_histograms"]
    records, index = list(make_records()), make_index()
    header, steps, values = matrix(tab, "1")
    expected = np.stack([r.columns["grad_norm"][index.is_parameter] for r in records]).astype(np.float32)
    np.testing.assert_array_equal(steps, [r.step for r in records])
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(header["ends"], steps)


def test_headline_scalars_incidents_and_histograms_of_a_folder_are_what_was_recorded(folder, open_tab):
    tab, records = open_tab(folder), list(make_records())
    header, steps, values = unpack(tab.get("/headline", run="1", columns=0).data)
    column = dict(zip(header["names"], values.T, strict=True))
    np.testing.assert_allclose(column["global_norm"], [r.global_norm for r in records], rtol=1e-6)
    np.testing.assert_allclose(column["loss"], [r.loss for r in records], rtol=1e-6)
    assert steps[column["clip_limit"] != MISSING].tolist() == [240, 241, 242, 243]
    assert not (column["limit"] != MISSING).any()
    header, steps, values = unpack(tab.get("/scalars", run="1", columns=0).data)
    cosines = dict(zip(header["names"], values.T, strict=True))["task_cos/seg/depth"]
    np.testing.assert_allclose(cosines, np.cos(steps / 80), rtol=1e-5)
    told = tab.json("/incidents", run="1")
    assert [(i["id"], i["rule"], i["first_step"]) for i in told["incidents"]] == [
        (i.id, i.rule, i.first_step) for i, _ in rank_incidents(make_incidents())
    ]
    assert told["verdict"] == json.loads(json.dumps(read_run(folder / "1").verdict().to_json()))
    header, steps, counts = unpack(tab.get("/histograms", run="1", path="h.2.mlp.c_proj.weight").data)
    assert steps.tolist() == list(range(0, 400, 20))
    np.testing.assert_allclose(counts.sum(axis=1), 4096, rtol=1e-6)


def test_a_run_with_both_is_read_from_its_folder_at_every_step_and_listed_once(tmp_path, open_tab):
    write_events(tmp_path / "version_0", window=50)
    write_folder(tmp_path / "version_0" / "gradwatch")
    tab = open_tab(tmp_path)
    assert [r["id"] for r in tab.json("/runs")["runs"]] == ["version_0"]
    header, steps, values = matrix(tab, "version_0")
    assert len(steps) == 400
    at = int(np.nanargmax(values[:, make_index().position("h.2.mlp.c_proj.weight")]))
    assert (steps[at], header["ends"][at]) == (240, 240)
    bad = np.isnan(values).any(axis=1)
    assert steps[bad].tolist() == [330]


def test_event_files_alone_say_which_steps_a_point_stands_for(tmp_path, open_tab):
    write_events(tmp_path / "one", window=50)
    header, steps, values = matrix(open_tab(tmp_path), "one")
    assert list(zip(steps.tolist(), header["ends"].tolist(), strict=True)) == [(a, a + 49) for a in range(0, 400, 50)]
    at = int(np.nanargmax(values[:, make_index().position("h.2.mlp.c_proj.weight")]))
    assert steps[at] <= 240 <= header["ends"][at]


@pytest.mark.parametrize(
    ("place", "name", "known_as"),
    [
        ("version_3/gradwatch", "gradwatch", "version_3"),
        ("version_3/gradwatch-1", "gradwatch", "version_3"),
        ("version_3/teacher", "teacher", "version_3@teacher"),
        ("deep/er/7", "gradwatch", "deep/er/7"),
        (".", "gradwatch", "."),
    ],
)
def test_a_folder_is_called_by_its_place_as_its_event_files_are(tmp_path, place, name, known_as):
    sink = RunFolder(tmp_path / place)
    sink.open(RunMeta(name=name))
    sink.close()
    assert [found.id for found in Folders(tmp_path)] == [known_as]


def test_folders_of_several_fits_in_one_place_are_each_a_run(tmp_path, open_tab):
    write_folder(tmp_path / "version_3" / "gradwatch", steps=20, incidents=[])
    write_folder(tmp_path / "version_3" / "gradwatch-1", steps=30, incidents=[])
    tab = open_tab(tmp_path)
    for _ in range(2):
        assert [r["id"] for r in tab.json("/runs")["runs"]] == ["version_3", "version_3/gradwatch-1"]
    assert len(matrix(tab, "version_3")[1]) == 20
    assert len(matrix(tab, "version_3/gradwatch-1")[1]) == 30


def test_a_folder_elsewhere_is_found_by_what_the_event_files_say(tmp_path, open_tab):
    meta = RunMeta(started=12.5, run_dir=str(tmp_path / "elsewhere"))
    folder, writer = RunFolder(), SummaryWriter(str(tmp_path / "logs" / "one"))
    sink = TensorBoardSink(writer)
    for each in (folder, sink):
        each.open(meta)
    records = list(make_records(steps=40))
    for i, record in enumerate(records):
        folder.write(record, [record])
        if i % 10 == 9:
            sink.write(record, records[i - 9 : i + 1])
    for each in (folder, sink, writer):
        each.close()
    tab = open_tab(tmp_path / "logs")
    assert [r["id"] for r in tab.json("/runs")["runs"]] == ["one"]
    assert matrix(tab, "one")[1].tolist() == list(range(40))
    # Another run's folder under the same name is not taken for it.
    told = json.loads((tmp_path / "elsewhere" / "meta.json").read_text().splitlines()[0])
    assert told["started"] == 12.5


def test_a_folder_that_another_run_took_over_is_not_the_event_files(tmp_path, open_tab):
    meta = RunMeta(started=1.0, run_dir=str(tmp_path / "elsewhere"))
    other = RunFolder(tmp_path / "elsewhere")
    other.open(RunMeta(started=2.0))
    other.close()
    writer = SummaryWriter(str(tmp_path / "logs" / "one"))
    sink = TensorBoardSink(writer)
    sink.open(meta)
    for record in make_records(steps=3):
        sink.write(record, [record])
    sink.close()
    writer.close()
    # The folder holds no records: what there is to see is the event files'.
    assert "grad_norm" in open_tab(tmp_path / "logs").json("/run", run="one")["statistics"]


def test_a_growing_folder_shows_what_was_written_since(tmp_path, open_tab):
    sink = RunFolder(tmp_path / "live")
    sink.open(META)
    records = list(make_records(steps=30))
    for record in records[:10]:
        sink.write(record, [record])
    tab = open_tab(tmp_path)
    assert matrix(tab, "live")[1].tolist() == list(range(10))
    for record in records[10:]:
        sink.write(record, [record])
    assert matrix(tab, "live")[1].tolist() == list(range(30))
    sink.close()
    assert matrix(tab, "live")[1].tolist() == list(range(30))


def test_a_damaged_folder_is_a_message_and_the_others_are_shown(tmp_path, open_tab):
    write_folder(tmp_path / "good", steps=20, incidents=[])
    write_folder(tmp_path / "bad", steps=20, incidents=[])
    for file in (tmp_path / "bad").glob("index-*.json"):
        file.write_text("{")
    tab = open_tab(tmp_path)
    with pytest.warns(UserWarning, match="The records that refer to it are read without their columns"):
        answer = tab.get("/matrix", run="bad", statistic="grad_norm")
    assert answer.status_code == 422
    assert answer.json["message"].startswith("bad has no statistic")
    assert matrix(tab, "good")[2].shape == (20, 52)


floats = st.floats(0, 1e9, width=32) | st.sampled_from([np.nan, np.inf, MISSING])


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=400),
    st.integers(0, 1000),
    st.integers(-5, 900),
    st.integers(-5, 900),
    st.integers(1, 12),
)
def test_a_view_hides_nothing_of_its_steps_and_says_which_they_are(gaps, seed, low, high, columns):
    steps = np.cumsum(gaps).astype(np.float64)
    matrix = np.random.default_rng(seed).random((len(steps), 2)).astype(np.float32)
    matrix[seed % len(matrix)] = np.nan
    view = Levels(Table(steps, matrix, ("a", "b"))).view(low, high, columns)
    within = (steps >= low) & (steps <= high)
    assert len(view.steps) <= columns
    assert view.measured == within.sum()
    if not within.any():
        return
    shown = np.zeros(len(steps), np.bool_)
    for first, last, row in zip(view.steps, view.ends, view.matrix, strict=True):
        mine = (steps >= first) & (steps <= last)
        np.testing.assert_array_equal(row, np.maximum.reduce(matrix[mine]))
        assert not (shown & mine).any()
        shown |= mine
    assert (shown >= within).all()
    assert shown.sum() <= within.sum() + 2 * FACTOR


def test_pages_of_a_long_run_come_from_the_coarse_copy_without_losing_a_spike():
    steps = np.arange(40_000, dtype=np.float64)
    matrix = np.ones((len(steps), 3), np.float32)
    matrix[31_337, 1] = 9.0
    levels = Levels(Table(steps, matrix, ("a", "b", "c")))
    whole = levels.view(-np.inf, np.inf, 1200)
    at = int(whole.matrix[:, 1].argmax())
    assert whole.steps[at] <= 31_337 <= whole.ends[at]
    assert len(whole.steps) == 1200
    near = levels.view(31_330, 31_340, 1200, 1)
    assert near.steps[near.matrix[:, 0].argmax()] == 31_337
