from __future__ import annotations

import json

import numpy as np
import pytest

from gradwatch.cli import FINE, FOUND, main
from gradwatch.cli._layers import layer_grid
from gradwatch.cli._sparkline import sparkline
from gradwatch.cli._terminal import Grid, plain, printable, rich_console
from gradwatch.report import ReportData
from gradwatch.runs import read_run

from .conftest import write_run


def test_healthy_run_reads_as_one(healthy, capsys) -> None:
    assert main(["summary", str(healthy), "--fail-on", "info"]) == FINE
    out, err = capsys.readouterr()
    assert out.startswith("healthy: Healthy: one rule judged 60 steps, and none fired.\n")
    assert "encoder.weight  ▅▅▅▅" in out
    assert err == ""


def test_biases_are_hidden_until_asked_for(healthy, capsys) -> None:
    main(["summary", str(healthy)])
    assert "encoder.bias" not in capsys.readouterr().out
    main(["summary", str(healthy), "--biases"])
    assert "encoder.bias" in capsys.readouterr().out


def test_ill_run_names_cause_place_and_advice(spiked, capsys) -> None:
    assert main(["summary", str(spiked)]) == FINE
    said = capsys.readouterr().out
    assert "Not healthy since step 30. The likely cause: the gradient exploded." in said
    row = "30 warning exploding decoder.weight +1 2.24e+03 40 open clip_to_limit"
    assert row in [" ".join(line.split()) for line in said.splitlines()]
    assert "What to do: Look at the batch." in said
    assert "gradwatch ran clip_to_limit for it." in said


@pytest.mark.parametrize(("bar", "code"), [("info", FOUND), ("warning", FOUND), ("critical", FINE), ("never", FINE)])
def test_fail_on_sets_the_exit_code(bar, code, spiked, capsys) -> None:
    assert main(["summary", str(spiked), "--fail-on", bar]) == code


def test_json_is_one_document(spiked, capsys) -> None:
    main(["summary", str(spiked), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "warning"
    assert [i["first_path"] for i in told["incidents"]] == ["decoder.weight"]
    assert {row["path"] for row in told["layers"]} == {"encoder.weight", "encoder.bias", "decoder.weight"}


def test_a_command_names_the_run_as_one_would_type_it_here(spiked, tmp_path, monkeypatch, capsys) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for place, path in ((spiked.parent, spiked.name), (elsewhere, str(spiked))):
        monkeypatch.chdir(place)
        main(["summary", str(spiked)])
        assert f"gradwatch replay {path} --rules" in capsys.readouterr().out.replace("\n", " ")


def test_layers_of_incidents_stay_when_room_is_short(spiked) -> None:
    grid, left_out = layer_grid(ReportData.from_run(read_run(spiked)), max_layers=1)
    assert left_out == 1
    assert grid.rows[0][-1] == "exploding"


def test_empty_run_is_said_to_be_empty(tmp_path, capsys) -> None:
    assert main(["summary", str(write_run(tmp_path / "empty", steps=0))]) == FINE
    assert "Not enough seen: nothing was recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        pytest.param([1, 10, 100], "▁▅█", id="a-decade-is-a-step"),
        pytest.param([1, 1.1, 1], "▄▅▄", id="noise-is-flat"),
        pytest.param([1, np.nan, np.inf, 0, -np.inf, 1], "▅!!· ▅", id="signs"),
        pytest.param([0, 0], "··", id="nothing-but-zero"),
        pytest.param([], "", id="empty"),
    ],
)
def test_sparkline(values, curve) -> None:
    assert sparkline(np.array(values, np.float64)) == curve


def test_sparkline_keeps_the_worst_of_each_piece() -> None:
    values = np.ones(1000)
    values[500] = np.nan
    curve = sparkline(values, 10)
    assert len(curve) == 10
    assert curve.count("!") == 1


def test_table_keeps_the_ends_of_names_in_a_narrow_terminal() -> None:
    grid = Grid(["layer", "n"], right=(1,))
    grid.add("transformer.h.11.attention.weight", "1")
    assert grid.lines(20) == ["layer              n", "...tention.weight  1"]
    assert grid.lines()[1] == "transformer.h.11.attention.weight  1"


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert printable("\x1b[31mred\x07\n") == "?[31mred?\n"


def test_json_holds_what_is_not_finite_as_words() -> None:
    assert plain({"a": float("nan"), "b": (float("-inf"), 1)}) == {"a": "nan", "b": ["-inf", 1]}


def test_colour_comes_only_on_a_terminal(healthy, monkeypatch, capsys) -> None:
    assert rich_console() is None
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    main(["summary", str(healthy)])
    assert "\x1b[32mhealthy: Healthy" in capsys.readouterr().out


def test_tables_fit_eighty_columns() -> None:
    from gradwatch.cli._layers import incident_grid
    from gradwatch.records import Incident

    path = "model.decoder.layers.11.self_attention.output_projection.weight"
    incident = Incident(
        rule="batch_norm_statistics", first_step=123_456, last_step=123_456, paths=(path, "b"), first_path=path,
        value=1.234e-5, limit=2.5e6, treatments=("clip_to_limit", "skip_step"), severity="critical",
        worst_path=f"{path}.x",
    )  # fmt: skip
    lines = incident_grid([incident]).lines(80)
    assert max(map(len, lines)) <= 80
    assert "1.23e-05" in lines[1]
