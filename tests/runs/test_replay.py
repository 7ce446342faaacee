import numpy as np
import pytest

from gradwatch.protocols import RunMeta
from gradwatch.records import TreatmentReport
from gradwatch.rules import Exploding, NonFinite, RuleBook, RuleEngine
from gradwatch.runs import compare, read_run, replay
from gradwatch.sinks import RunFolder

from ..sinks.made import mixed_index, record


def series(n=200, seed=0, **at):
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, 0.2, n))
    for step, value in at.items():
        norms[int(step[1:])] = value
    return norms.tolist()


def records(norms, **more):
    return [record(t, norm=norm, loss=norm, **more) for t, norm in enumerate(norms)]


def written(path, made, *, meta=None, complete=True, annotations=()):
    folder = RunFolder(path, flush_records=16)
    folder.open(meta or RunMeta())
    for r in made:
        folder.write(r)
        for annotation in annotations:
            if annotation["at"] == r.step:
                folder.annotate(**{k: v for k, v in annotation.items() if k != "at"})
    if complete:
        folder.summary("done")
    folder.close()
    return read_run(path)


def book():
    return RuleBook([Exploding(), NonFinite()])


def live(made, rules=None, annotations=()):
    engine = RuleEngine(rules or book())
    for r in made:
        for phase in ("early", "late"):
            engine.judge(r, phase)
            for report in r.treatments if phase == "early" else ():
                engine.note_treatments(report.rule, (report.name,))
        for annotation in annotations:
            if annotation["at"] == r.step:
                engine.annotate(**{k: v for k, v in annotation.items() if k != "at"})
    engine.finish(made[-1].step)
    return engine.incidents


def test_replay_equals_the_live_incidents_exactly(tmp_path):
    made = records(series(s120=500.0, s121=800.0, s160=float("nan")))
    clip = TreatmentReport(name="clip_to_limit", rule="exploding", before=500.0, after=2.0, values={"limit": 2.0})
    made[120] = record(120, norm=500.0, loss=500.0, treatments=(clip,))
    found = replay(written(tmp_path, made), book())
    expected = live(made)
    assert {i.rule for i in expected} == {"exploding", "non_finite"}
    assert found.differences(expected) == []
    assert found.incidents[0].treatments == ("clip_to_limit",)
    assert found.findings


def test_differences_are_told_in_sentences(tmp_path):
    made = records(series(s120=500.0))
    found = replay(written(tmp_path, made), book())
    other = live(records(series(s120=600.0)))
    assert any("`value` was 600.0 live and is 500.0 in the replay" in d for d in found.differences(other))
    assert found.differences([])[0].startswith("only in the replay: [warning] step 120: exploding")
    assert replay(written(tmp_path / "x", records(series())), book()).differences(other)[0].startswith("only live")


def test_silence_that_was_announced_live_is_kept_in_the_replay(tmp_path):
    made = records(series(s120=500.0, s180=500.0))
    told = [{"at": 110, "text": "data switch", "silence": 20}]
    run = written(tmp_path, made, annotations=told)
    assert [(a["text"], a["after_step"]) for a in run.annotations] == [("data switch", 110)]
    found = replay(run, book())
    assert [i.first_step for i in found] == [180]
    assert found.differences(live(made, annotations=told)) == []


def test_resumed_run_is_judged_as_one(tmp_path):
    made = records(series(s150=500.0))
    written(tmp_path, made[:120], complete=False)
    run = written(tmp_path, made[100:], meta=RunMeta(start_step=100))
    assert replay(run, book()).differences(live(made)) == []


def test_optimizers_that_step_on_their_own_are_judged_apart(tmp_path):
    made = []
    for t, norm in enumerate(series(400, s301=50.0)):
        scale, which = (1000.0, 1.0) if t % 2 else (1.0, 0.0)
        made.append(record(t, norm=norm * scale, loss=1.0, scalars={"optimizer": which}))
    found = replay(written(tmp_path, made), book())
    assert [i.first_step for i in found] == [301]


def test_other_rules_may_be_tried_by_the_name_of_a_preset(tmp_path):
    run = written(tmp_path, records(series(s120=500.0)))
    assert len(replay(run, "observe")) == 0
    assert "exploding" in {i.rule for i in replay(run, "default")}


def test_coverage_says_which_rules_saw_nothing(tmp_path):
    found = replay(written(tmp_path, records(series(20))), book())
    assert {c.name: c.judged for c in found.coverage}["non_finite"] == 21  # and the end


def test_run_that_was_cut_short_is_not_judged_as_a_whole(tmp_path):
    run = written(tmp_path, records(series(30)), complete=False)
    assert not run.complete
    assert replay(run, book()).num_records == 30


# Comparing


def test_equal_runs_never_differ(tmp_path):
    a, b = (written(tmp_path / name, records(series(30))) for name in "ab")
    found = compare(a, b)
    assert found.first_difference is None
    assert (found.settings, found.only_a, found.only_b) == ({}, [], [])
    assert all(d.ratio == 1 for d in found.layers)
    assert "never differ" in str(found)


def test_differences_of_two_runs_are_found(tmp_path):
    a = written(tmp_path / "a", records(series(30)), meta=RunMeta(options={"every": 1}))
    norms = [n * 2 if t >= 10 else n for t, n in enumerate(series(30))]
    made = [record(t, mixed_index(4, 2), norm=norm, loss=norm, skipped=t == 5) for t, norm in enumerate(norms)]
    b = written(tmp_path / "b", made, meta=RunMeta(options={"every": 2}))
    found = compare(a, b)
    assert found.first_difference == 10
    assert found.numbers["steps skipped"] == (0, 1)
    assert found.settings == {"options.every": (1, 2)}
    assert found.only_paths_b == ["blocks.3.weight"]
    assert found.layers[0].ratio > 1.2
    assert "first differ at step 10" in str(found)


def test_run_and_log_of_another_program_can_be_compared(tmp_path):
    from gradwatch.runs import read_log

    run = written(tmp_path / "a", records(series(5)))
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{t},{t}\n" for t in range(5)))
    assert compare(run, read_log(tmp_path / "log.csv")).first_difference == 0


@pytest.mark.parametrize("empty", [0, 1])
def test_empty_runs_can_be_compared(tmp_path, empty):
    a = written(tmp_path / "a", [])
    b = written(tmp_path / "b", records(series(3)) if empty else [])
    assert compare(a, b).numbers["steps"] == (0, 3 * empty)
