from __future__ import annotations

import os
import shutil

import pytest

from gradwatch.cli._find import existing, open_run, pairs
from gradwatch.errors import ConfigError, RunFormatError


def test_run_folder_is_opened(healthy, capsys) -> None:
    assert open_run(str(healthy)).path == healthy
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["meta.json", "incidents.jsonl"])
def test_a_file_of_the_run_stands_for_it(file, spiked) -> None:
    assert open_run(str(spiked / file)).path == spiked


def test_folder_above_stands_for_the_newest_run_and_says_so(healthy, spiked, capsys) -> None:
    for file in spiked.iterdir():
        os.utime(file, (1, 1))
    assert open_run(str(healthy.parent)).path == healthy
    assert capsys.readouterr().err == f"{healthy}: the newest of 2 runs below {healthy.parent}\n"


def test_misspelt_run_names_the_nearest_with_its_folder(healthy) -> None:
    with pytest.raises(ConfigError) as error:
        open_run(str(healthy.parent / "helthy"))
    assert str(error.value) == f"there is no run '{healthy.parent}/helthy'. Did you mean '{healthy}'?"


def test_misspelt_folder_above_is_named(healthy) -> None:
    with pytest.raises(ConfigError, match=rf"nor a folder '.*/rums'\. Did you mean '{healthy.parent}'\?"):
        existing(str(healthy.parent.with_name("rums") / "healthy"), "run")


def test_folder_without_anything_says_so(tmp_path) -> None:
    with pytest.raises(RunFormatError, match="there is no run folder, and no other log, at or below"):
        open_run(str(tmp_path))


def test_log_of_another_program_is_read(tmp_path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,cost\n" + "".join(f"{i},{1 / (i + 1)}\n" for i in range(5)))
    assert len(open_run(str(log), scalars={"loss": "cost"})) == 5


def test_run_of_a_higher_schema_is_refused_in_words(healthy) -> None:
    meta = healthy / "meta.json"
    meta.write_text(meta.read_text().replace('"schema":2', '"schema":99'))
    with pytest.raises(RunFormatError, match="schema 99"):
        open_run(str(healthy))
    shutil.rmtree(healthy)


def test_pairs() -> None:
    assert pairs(["loss=my/tag", "a=b=c"], "--scalar") == {"loss": "my/tag", "a": "b=c"}
    with pytest.raises(ConfigError) as error:
        pairs(["loss"], "--scalar")
    assert str(error.value) == "--scalar takes NAME=VALUE. Got 'loss'."
