from __future__ import annotations

import json

import pytest

from gradwatch.cli import FINE, FOUND, USAGE, main


def test_report_is_written_where_asked(spiked, tmp_path, capsys) -> None:
    target = tmp_path / "page.html"
    assert main(["report", str(spiked), "-o", str(target)]) == FINE
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    assert "The likely cause: the gradient exploded." in err
    assert "The gradient exploded" in target.read_text()


def test_a_folder_that_is_not_there_is_not_made(spiked, tmp_path, capsys) -> None:
    assert main(["report", str(spiked), "-o", str(tmp_path / "new" / "page.html")]) == USAGE
    assert f"there is no folder {str(tmp_path / 'new')!r} for 'page.html'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_several_runs_go_into_one_page(spiked, healthy, tmp_path, capsys) -> None:
    target = tmp_path / "page.html"
    assert main(["report", str(spiked), str(healthy), "-o", str(target), "--fail-on", "warning"]) == FOUND
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    assert "spiked: Not healthy since step 30." in err
    assert "healthy: Healthy" in err
    page = target.read_text()
    assert page.count('<header class="gw-report') == 2
    assert page.count("<svg ") == 2


@pytest.mark.parametrize("options", [["--format", "md"], ["-o", "-"], ["--json"]])
def test_several_runs_are_one_page_alone(options, spiked, healthy, capsys) -> None:
    assert main(["report", str(spiked), str(healthy), *options]) == USAGE
    assert "one HTML file alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [([], "report.html"), (["--format", "md"], "report.md"), (["--format", "json"], "report.json")],
)
def test_report_goes_to_the_run_by_default(arguments, name, spiked, capsys) -> None:
    main(["report", str(spiked), *arguments])
    assert capsys.readouterr().out == f"{spiked / name}\n"
    assert (spiked / name).stat().st_size


def test_report_to_stdout_is_data_alone(spiked, capsys) -> None:
    assert main(["report", str(spiked), "-o", "-", "--format", "json", "--fail-on", "warning"]) == FOUND
    assert json.loads(capsys.readouterr().out)["state"] == "warning"


def test_picture_to_stdout_is_refused(spiked, capsys) -> None:
    assert main(["report", str(spiked), "-o", "-", "--format", "png"]) == USAGE
    assert capsys.readouterr().err == "gradwatch: a picture can't go to stdout: give -o FILE.\n"


def test_json_says_what_was_written(spiked, tmp_path, capsys) -> None:
    main(["report", str(spiked), "-o", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(tmp_path / "report.html")
    assert told["bytes"] == (tmp_path / "report.html").stat().st_size


def test_log_of_another_program_has_a_report_too(tmp_path, capsys) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{1 / (i + 1)}\n" for i in range(5)))
    assert main(["report", str(log)]) == FINE
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
