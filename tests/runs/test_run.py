import numpy as np
import pytest

from gradwatch.cli import main
from gradwatch.errors import GradwatchWarning, RunFormatError, UnknownNameError, UnknownPathError
from gradwatch.protocols import RunMeta
from gradwatch.records import Histogram
from gradwatch.runs import find_runs, read_run, verdict
from gradwatch.sinks import RunFolder
from tensorboard_plugin_gradwatch._folders import Folders

from ..sinks.made import INDEX, mixed_index, record


def written(path, records, **options):
    folder = RunFolder(path, **options)
    folder.open(RunMeta(model="Net"))
    for r in records:
        folder.write(r)
        if len(read_run(path)) % options.get("flush_records", 1000) == 0:
            folder.flush()
    folder.close()
    return read_run(path)


def test_matrix_of_a_column_tells_nan_from_not_measured(tmp_path):
    values = np.array([np.nan, 2.0, 3.0, 0, 0])
    mask = np.array([True, True, False, False, False])
    run = written(
        tmp_path,
        [
            record(0),
            record(1, columns={}, masks={}),
            record(2, columns={"grad_norm": values}, masks={"grad_norm": mask}),
        ],
    )
    steps, matrix = run.matrix("grad_norm")
    assert steps.tolist() == run.steps("grad_norm").tolist() == [0, 2]
    np.testing.assert_array_equal(matrix, [[1, 2, 3, np.nan, np.nan], [np.nan, 2, np.nan, np.nan, np.nan]])
    assert run.measured("grad_norm").tolist() == [[True] * 3 + [False] * 2, [True, True, False, False, False]]
    assert run.steps().tolist() == [0, 1, 2]


def test_matrix_runs_over_the_newest_index_by_path(tmp_path):
    fewer, more = mixed_index(2, 1), mixed_index(3, 0)
    run = written(tmp_path, [record(0, fewer), record(1, more, norm=2.0)])
    np.testing.assert_array_equal(run.matrix("grad_norm")[1], [[1, 2, np.nan], [2, 4, 6]])
    assert run.index.paths == more.paths


def test_scalars_are_read_where_they_were_measured(tmp_path):
    run = written(tmp_path, [record(0, scalars={"val_loss": 5.0}), record(1, has_loss=False), record(2, skipped=True)])
    assert [a.tolist() for a in run.scalar("val_loss")] == [[0], [5.0]]
    assert [a.tolist() for a in run.scalar("loss")] == [[0, 2], [1.0, pytest.approx(1 / 3)]]
    assert run.scalar("skipped")[1].tolist() == [0, 0, 1]
    assert run.scalar("global_norm")[1].tolist() == [1.0] * 3
    assert run.scalars[-1] == "val_loss"


def test_histograms_of_a_path_are_read_as_counts(tmp_path):
    counts = [Histogram(np.arange(512) * k) for k in (1, 2)]
    run = written(
        tmp_path,
        [
            record(0, histograms={"blocks.1.weight": counts[0]}),
            record(1),
            record(2, histograms={"blocks.1.weight": counts[1]}),
        ],
    )
    steps, found = run.histograms("blocks.1.weight")
    assert steps.tolist() == [0, 2]
    assert (found == np.array([c.counts for c in counts])).all()
    assert run.histograms("blocks.0.weight")[1].shape == (0, 512)


def test_empty_run_is_read(tmp_path):
    run = written(tmp_path, [])
    assert len(run) == 0
    assert list(run.records()) == []
    assert run.index.paths == ()
    assert run.incidents == []
    assert run.scalar("loss")[0].shape == (0,)
    assert run.summary == ""


def test_unknown_names_are_errors_that_name_the_nearest(tmp_path):
    run = written(tmp_path, [record(0)])
    with pytest.raises(UnknownNameError, match=r"there is no column 'grad_norms'\. Did you mean 'grad_norm'"):
        run.matrix("grad_norms")
    with pytest.raises(UnknownNameError, match=r"there is no scalar 'los'\. Did you mean 'loss'"):
        run.scalar("los")
    with pytest.raises(UnknownPathError, match=r"Did you mean 'blocks\.1\.weight'"):
        run.histograms("blocks.1.weigh")


def test_growing_run_is_read_on_from_where_it_was(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(RunMeta())
    folder.write(record(0))
    folder.flush()
    run = read_run(tmp_path)
    assert len(run) == 1
    (file,) = (file for file in run._files.values() if file.path.suffix == ".gwr")
    before = file.blocks[0]
    folder.write(record(1))
    folder.flush()
    assert run.refresh()
    assert len(run) == 2
    assert run._files[file.path].blocks[0] is before
    folder.close()


def test_run_that_is_thinned_while_it_is_read_is_read_again(tmp_path):
    index = mixed_index(400, 0)
    folder = RunFolder(tmp_path, limit_mb=0.6, flush_records=4)
    folder.open(RunMeta())
    run = read_run(tmp_path)
    for t in range(300):
        folder.write(record(t, index, norm=0.1))
        if t % 50 == 49:
            folder.flush()
            run.refresh()
            assert run.steps().tolist() == list(range(t + 1))
    assert run.thinned
    folder.close()


def test_damaged_block_is_one_warning_and_the_rest_is_read(tmp_path):
    written(tmp_path, [record(t) for t in range(6)], flush_records=2)
    (file,) = tmp_path.glob("records*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    run = read_run(tmp_path)
    with pytest.warns(GradwatchWarning) as caught:
        steps = run.steps().tolist()
    assert len(steps) == 4
    assert "are damaged and left out (2 records of steps 2 to 3); the rest is read" in str(caught[0].message)
    assert "2 records after step 1 and before step 4 are missing" in str(caught[1].message)
    assert run.health.num_missing == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "is not a run folder: it has no meta.json", id="none"),
        pytest.param("{", "is not JSON", id="no-json"),
        pytest.param('{"format": "x"}', "is not of a gradwatch run", id="other-format"),
        pytest.param(
            '{"format": "gradwatch-run", "schema": 9}', "has schema 9; this gradwatch reads up to 2", id="schema"
        ),
        pytest.param('{"format": "gradwatch-run"}', "has schema None", id="no-schema"),
    ],
)
def test_what_is_no_run_folder_is_an_error_that_says_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(RunFormatError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{}", r"index-000\.json has schema None", id="no-schema"),
        pytest.param("{", r"index-000\.json is not JSON", id="no-json"),
        pytest.param('{"schema": 1, "paths": 3}', r"index-000\.json is not an index", id="no-index"),
        pytest.param(None, r"index-000\.json is missing: records refer to it", id="missing"),
    ],
)
def test_records_whose_index_is_gone_are_read_without_their_columns_and_it_is_told(tmp_path, content, message):
    written(tmp_path, [record(0)])
    (tmp_path / "index-000.json").unlink()
    if content is not None:
        (tmp_path / "index-000.json").write_text(content)
    with pytest.warns(GradwatchWarning, match=message):
        (back,) = read_run(tmp_path).records()
    assert (back.loss, back.global_norm, back.columns) == (1.0, 1.0, {})


def test_index_of_a_higher_schema_is_refused(tmp_path):
    written(tmp_path, [record(0)])
    (tmp_path / "index-000.json").write_text('{"schema": 99}')
    with pytest.raises(RunFormatError, match=r"index-000\.json has schema 99; .* Update gradwatch"):
        len(read_run(tmp_path))


def test_runs_are_found_below_a_folder_and_others_passed_over(tmp_path):
    for name in ("b/version_0/gradwatch", "a"):
        written(tmp_path / name, [record(0)])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").write_text("[]")
    assert [str(p.relative_to(tmp_path)) for p in find_runs(tmp_path)] == ["a", "b/version_0/gradwatch"]


def test_index_comes_back_whole(tmp_path):
    assert written(tmp_path, [record(0)]).index.to_json() == INDEX.to_json()


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_run_without_a_sound_meta_is_found_at_every_door(tmp_path, damage, capsys):
    """Its records are there: who reads it finds them, so who looks for it must find it."""
    folder = tmp_path / "runs" / "one"
    written(folder, [record(step) for step in range(3)])
    whole = (folder / "meta.json").read_text()
    (folder / "meta.json").unlink()
    if damage == "cut":
        (folder / "meta.json").write_text(whole[: len(whole) // 2])
    assert find_runs(tmp_path) == [folder]
    with pytest.warns(GradwatchWarning, match=r"meta\.json"):
        assert str(read_run(folder).health) == "how it ended is not on record"
    for given in (folder, tmp_path):
        capsys.readouterr()
        main(["summary", str(given)])
        said = capsys.readouterr()
        assert said.out.startswith("one: Not enough seen")
        assert "meta.json" in said.err
    with pytest.warns(GradwatchWarning, match=r"meta\.json"):
        assert verdict(folder).num_steps == 3
    (shown,) = Folders(tmp_path)
    assert (shown.id, shown.path) == ("runs/one", folder)
    with pytest.warns(GradwatchWarning, match=r"meta\.json"):
        assert len(shown.headline().steps) == 3
