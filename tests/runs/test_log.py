import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch.errors import ConfigError, RunFormatError, UnknownNameError
from gradwatch.report import ReportData
from gradwatch.rules import Exploding, NonFinite, RuleBook
from gradwatch.runs import read_log, replay

from ..sinks.made import record


def events(path, **series):
    with SummaryWriter(str(path)) as writer:
        for tag, values in series.items():
            for step, value in values.items():
                writer.add_scalar(tag.replace("__", "/"), value, step)
    return path


def test_tensorboard_log_becomes_records(tmp_path):
    log = read_log(
        events(tmp_path, train__loss={0: 2.0, 10: 1.0}, train__grad_norm={0: 0.5, 10: 0.25}, lr={0: 0.1}, epoch={10: 1},
               eval__loss={10: 3.0}, accuracy={5: 0.5})
    )  # fmt: skip
    first, second = log.records()
    assert (first.step, first.loss, first.global_norm, first.lr) == (0, 2.0, 0.5, pytest.approx(0.1))
    assert (second.step, second.epoch, second.has_loss) == (10, 1, True)
    assert second.scalars == {"val_loss": 3.0, "accuracy": 0.5}  # what came in between joins the next record
    assert log.meta["format"] == "tensorboard"
    assert log.meta["roles"]["global_norm"] == "train/grad_norm"
    assert log.scalar("loss")[1].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("tag", "role"),
    [
        ("loss", "loss"), ("train_loss", "loss"), ("Train/Loss", "loss"), ("model/train_loss", "loss"),
        ("grad_norm", "global_norm"), ("grad_2.0_norm_total", "global_norm"), ("optim/grad_norm", "global_norm"),
        ("lr-Adam", "lr"), ("lr-AdamW/pg1", "lr"), ("train/learning_rate", "lr"),
        ("eval_loss", "val_loss"), ("val/loss", "val_loss"), ("fold0/val_loss", "val_loss"),
    ],
)  # fmt: skip
def test_tag_is_known_by_its_name(tmp_path, tag, role):
    (tmp_path / "log.csv").write_text(f"step,a_norm,{tag}\n0,1,1\n")
    log = read_log(tmp_path / "log.csv", columns={"grad_norm": "a_*"})
    assert log.meta["roles"].get(role) == tag


def test_per_parameter_norms_become_a_column(tmp_path):
    series = {
        "grad_2.0_norm/enc.0.weight": {0: 1.0, 1: 2.0},
        "grad_2.0_norm/dec.weight": {1: 3.0},
        "grad_2.0_norm_total": {0: 1.0, 1: 3.6},
    }
    log = read_log(events(tmp_path, **series))
    assert log.index.paths == ("enc.0.weight", "dec.weight")
    np.testing.assert_array_equal(log.matrix("grad_norm")[1], [[1, np.nan], [2, 3]])
    assert log.scalar("global_norm")[1].tolist() == [1.0, pytest.approx(3.6)]


def test_lightning_csv_with_rows_of_train_and_validation_apart(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,0,2.0,\n0,1,1.5,\n0,1,,1.8\n1,2,nan,\n")
    records = list(read_log(tmp_path / "metrics.csv").records())
    assert [r.step for r in records] == [0, 1, 2]
    assert [r.loss for r in records[:2]] == [2.0, 1.5]
    assert np.isnan(records[2].loss)
    assert records[2].has_loss
    assert records[1].scalars == {"val_loss": 1.8}
    assert records[2].epoch == 1


def test_names_that_do_not_tell_are_given(tmp_path):
    (tmp_path / "log.tsv").write_text("it\tobjective\tnorms.a\tnorms.b\n5\t1.0\t2\t3\n")
    log = read_log(tmp_path / "log.tsv", scalars={"loss": "objective", "step": "it"}, columns={"grad_norm": "norms.*"})
    (only,) = log.records()
    assert (only.step, only.loss) == (5, 1.0)
    assert only["grad_norm", "b"] == 3.0


def test_log_of_another_program_is_judged_by_our_rules(tmp_path):
    rng = np.random.default_rng(0)
    norms = dict(enumerate(np.exp(rng.normal(0, 0.2, 200)).tolist()))
    norms |= {150: 900.0, 170: float("nan")}
    log = read_log(events(tmp_path, grad_norm=norms, loss=dict.fromkeys(norms, 1.0)))
    found = replay(log, RuleBook([Exploding(), NonFinite()]))
    assert {(i.rule, i.first_step) for i in found} == {("exploding", 150), ("non_finite", 170)}
    assert found.num_records == 200


def test_our_own_csv_is_a_log_too(tmp_path):
    from gradwatch.protocols import RunMeta
    from gradwatch.sinks import CsvSink

    sink = CsvSink(tmp_path / "log.csv")
    sink.open(RunMeta())
    for step in range(3):
        sink.write(record(step, norm=2.0))
    log = read_log(tmp_path / "log.csv")
    assert [(r.global_norm, r.loss) for r in log.records()] == [(2.0, 1.0), (2.0, 0.5), (2.0, pytest.approx(1 / 3))]


def test_one_run_below_a_folder_is_found_and_several_are_named(tmp_path):
    events(tmp_path / "version_0", loss={0: 1.0})
    events(tmp_path / "version_0" / "gradwatch", x={0: 1.0})
    assert len(read_log(tmp_path)) == 1
    events(tmp_path / "version_1", loss={0: 1.0})
    with pytest.raises(RunFormatError, match="holds 2 runs; give one of them: version_0, version_1"):
        read_log(tmp_path)


def test_log_that_can_not_be_read_says_why(tmp_path):
    with pytest.raises(RunFormatError, match="does not exist"):
        read_log(tmp_path / "x")
    with pytest.raises(RunFormatError, match="holds neither event files"):
        read_log(tmp_path)
    (tmp_path / "log.csv").write_text("step,accuracy\n0,1\n")
    with pytest.raises(RunFormatError, match=r"neither a loss nor a gradient norm .* Its tags: accuracy\."):
        read_log(tmp_path / "log.csv")
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(RunFormatError, match=r"Its tags: none\."):
        read_log(tmp_path / "log.csv")
    (tmp_path / "log.csv").write_text("step,loss\n0,1\n")
    with pytest.raises(UnknownNameError, match=r"there is no tag 'los'\. Did you mean 'loss'"):
        read_log(tmp_path / "log.csv", scalars={"loss": "los"})
    with pytest.raises(ConfigError, match=r"the pattern of a column has one `\*`"):
        read_log(tmp_path / "log.csv", columns={"grad_norm": "a"})


def test_garbage_is_an_error_and_no_crash(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\0" * 100)
    with pytest.raises(RunFormatError):
        read_log(tmp_path)


@pytest.mark.parametrize("name", ["run", "gradwatch", "metrics.csv"])
def test_a_log_is_called_by_its_own_name(tmp_path, name):
    """Two runs of one folder would otherwise share one."""
    if name.endswith(".csv"):
        (tmp_path / name).write_text("step,loss\n0,1\n")
    else:
        events(tmp_path / name, loss={0: 1.0})
    assert ReportData.from_run(read_log(tmp_path / name)).name == name
