"""What the tab's routes answer over event files written by the real sink."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch.protocols import RunMeta
from gradwatch.records import SCHEMA_VERSION, Column, StepRecord, add_column, rank_incidents
from gradwatch.sinks.tensorboard import TensorBoardSink
from tensorboard_plugin_gradwatch import MISSING, STATIC
from tensorboard_plugin_gradwatch._catalogue import SCHEMA
from tensorboard_plugin_gradwatch._wire import unpack

from .conftest import Tab
from .synthetic import make_incidents, make_index, make_records

ASKED = {"run": "spike", "statistic": "grad_norm"}


def matrix(tab: Tab, **query: object):
    response = tab.get("/matrix", **{"run": "spike", "statistic": "grad_norm", "columns": 0, **query})
    assert response.status_code == 200, response.text
    return unpack(response.data)


def test_tab_reads_the_schema_that_is_written():
    assert SCHEMA == SCHEMA_VERSION


def test_runs_lists_every_run_with_gradwatch_data(tab):
    runs = tab.json("/runs")["runs"]
    assert [(r["id"], r["message"]) for r in runs] == [("healthy", ""), ("spike", "")]


def test_run_gives_the_index_and_the_statistics_with_what_they_run_over(tab):
    run = tab.json("/run", run="spike")
    assert run["index"] == make_index().to_json()
    assert run["statistics"]["grad_norm"] == {"over": "parameter"}
    assert run["statistics"]["output_rms"] == {"over": "module"}
    assert run["meta"]["model"] == "GPT"
    assert run["has_histograms"]


def test_matrix_is_what_was_recorded(tab):
    header, steps, values = matrix(tab)
    records = list(make_records())
    index = make_index()
    expected = np.stack([r.columns["grad_norm"][index.is_parameter] for r in records]).astype(np.float32)
    np.testing.assert_array_equal(steps, [r.step for r in records])
    np.testing.assert_array_equal(values, expected)  # nan at step 330 and zeros from 300 on among them
    assert (header["steps"], header["rows"], header["ends"][-1], header["left_out"]) == (400, 52, 399, 0)


def test_a_spike_of_one_step_and_a_nan_survive_pooling(tab):
    full, (_, steps, pooled) = matrix(tab)[2], matrix(tab, columns=7)
    assert pooled.shape == (7, 52)
    assert steps[0] == 0
    assert np.isnan(pooled).sum() == 1
    np.testing.assert_array_equal(np.nanmax(pooled, axis=0), np.nanmax(full, axis=0))


def test_matrix_between_two_steps_holds_these_alone(tab):
    _, steps, values = matrix(tab, **{"from": 238, "to": 243})
    assert steps.tolist() == [238, 239, 240, 241, 242, 243]
    assert values.shape == (6, 52)


def test_matrix_of_one_path_is_its_row(tab):
    path = "h.2.mlp.c_proj.weight"
    one, full = matrix(tab, path=path)[2], matrix(tab)[2]
    np.testing.assert_array_equal(one[:, 0], full[:, make_index().position(path)])


def test_signed_statistics_come_as_sizes(tab):
    values = matrix(tab, statistic="output_mean")[2]
    assert (values >= 0).all()


def test_scalars_hold_the_cosines_of_tasks(tab):
    header, steps, values = unpack(tab.get("/scalars", run="spike").data)
    column = dict(zip(header["names"], values.T, strict=True))
    np.testing.assert_allclose(column["task_cos/seg/depth"], np.cos(steps / 80), rtol=1e-5)


def test_headline_holds_norms_and_limits(tab):
    header, steps, values = unpack(tab.get("/headline", run="spike").data)
    column = dict(zip(header["names"], values.T, strict=True))
    records = list(make_records())
    np.testing.assert_allclose(column["global_norm"], [r.global_norm for r in records], rtol=1e-6)
    limited = column["limit"] != MISSING
    assert steps[limited].tolist() == [240, 241, 242, 243]
    assert np.isnan(column["global_norm"][330])


def test_incidents_come_in_order_with_their_last_state(tab):
    told = tab.json("/incidents", run="spike")["incidents"]
    assert [(i["id"], i["rule"], i["first_step"], i["resolved"]) for i in told] == [
        (i.id, i.rule, i.first_step, i.resolved) for i, _ in rank_incidents(make_incidents())
    ]
    assert next(i for i in told if i["rule"] == "non_finite")["value"] == "nan"


def test_histograms_of_a_path_lie_on_one_grid_and_keep_their_totals(tab):
    header, steps, counts = unpack(tab.get("/histograms", run="spike", path="h.2.mlp.c_proj.weight").data)
    assert steps.tolist() == list(range(0, 400, 20))
    np.testing.assert_allclose(counts.sum(axis=1), 4096, rtol=1e-6)
    modes = header["left"] + header["width"] * counts[:, 2:].argmax(axis=1)
    assert modes[12] - np.median(modes) > 2.5  # the spike at step 240 is three decades to the right


def test_histograms_of_an_unknown_path_are_empty(tab):
    header, _, _ = unpack(tab.get("/histograms", run="spike", path="no.such.path").data)
    assert header["steps"] == 0


@pytest.mark.parametrize(
    ("route", "query", "said"),
    [
        pytest.param("/run", {"run": "x"}, "There is no run 'x' with gradwatch data. There are healthy", id="run"),
        pytest.param("/matrix", {"run": "spike", "statistic": "x"}, "spike has no statistic 'x'.", id="statistic"),
        pytest.param("/matrix", ASKED | {"path": "x"}, "spike has no 'grad_norm' of 'x'.", id="path"),
        pytest.param("/scalars", {}, "There is no run ''", id="nothing-asked"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_answered_with_a_message(tab, route, query, said):
    response = tab.get(route, **query)
    assert response.status_code == 422
    assert response.json["message"].startswith(said)


@pytest.mark.parametrize("columns", ["nan", "-3", "x", "1e9"])
def test_a_number_of_columns_that_is_none_is_borne(tab, columns):
    assert tab.get("/matrix", run="spike", statistic="grad_norm", columns=columns).status_code == 200


def test_static_files_are_served_as_what_they_are(tab):
    response = tab.get("/static/index.js")
    assert response.content_type == "text/javascript; charset=utf-8"
    assert response.data == (STATIC / "index.js").read_bytes()
    assert tab.get("/static/vendor/uPlot.js").status_code == 200
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "name", ["../plugin.py", "..%2fplugin.py", "vendor/../../plugin.py", "/etc/passwd", "vendor/LICENSE-uPlot", ""]
)
def test_static_serves_nothing_but_its_list(tab, name):
    assert tab.get(f"/static/{name}").status_code == 404


def test_second_callback_in_a_run_is_a_source_of_its_own(tmp_path, open_tab):
    from .synthetic import write_events

    write_events(tmp_path / "two", name="teacher", steps=30, incidents=[])
    runs = open_tab(tmp_path).json("/runs")["runs"]
    assert [r["id"] for r in runs] == ["two@teacher"]
    assert open_tab(tmp_path).json("/run", run="two@teacher")["statistics"]


def test_window_maximum_is_preferred_to_the_newest_value(tmp_path, open_tab):
    from .synthetic import write_events

    write_events(tmp_path / "windows", window=20)
    _, steps, values = unpack(open_tab(tmp_path).get("/matrix", run="windows", statistic="grad_norm").data)
    assert len(steps) == 20
    path = make_index().position("h.2.mlp.c_proj.weight")
    largest = max(r.columns["grad_norm"][path] for r in make_records())
    assert values[:, path].max() == np.float32(largest)


def test_run_says_what_is_told_of_a_column_of_ones_own(tmp_path, open_tab):
    own = Column(name="column_of_the_tab", kind="parameter", meaning="What it is.", label="a label", scale="share")
    add_column(own)
    index = make_index()
    writer = SummaryWriter(str(tmp_path / "one"))
    sink = TensorBoardSink(writer)
    sink.open(RunMeta())
    sink.write(StepRecord(step=0, index=index, columns={"column_of_the_tab": np.ones(len(index))}), ())
    sink.close()
    writer.close()
    run = open_tab(tmp_path).json("/run", run="one")
    assert run["statistics"]["column_of_the_tab"]["about"] == own.to_json()
