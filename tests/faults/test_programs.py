"""The faulty programs are well-formed, repeatable, and differ from their fixed twins in their fault alone."""

import pytest
import torch
from fault_programs import CONTROLS, DIAGNOSES, FAULTY, PROGRAMS, Run, Unwatched, manifests, run, score

from gradwatch import Watch
from gradwatch.rules import RULES


def test_there_are_67_published_programs_and_more_healthy_ones():
    assert len(FAULTY) == 67
    assert len(CONTROLS) >= 25
    assert len(PROGRAMS) == len(FAULTY) + len(CONTROLS)


def test_every_fault_has_rules_that_name_it():
    faults = {fault for p in FAULTY for fault in p.faults}
    assert faults <= set(DIAGNOSES)
    assert all(p.faults for p in FAULTY)


def test_every_diagnosis_is_a_rule():
    assert frozenset().union(*DIAGNOSES.values()) <= set(RULES)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_program_is_made_the_same_each_time(program):
    for faulty in (False,) if program.is_control else (False, True):
        first, second = program.make(1, faulty=faulty), program.make(1, faulty=faulty)
        ours, theirs = first.model.state_dict(), second.model.state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert all(torch.equal(a, b) for a, b in zip(first.data, second.data, strict=True))
        assert len(first.data[0]) == len(first.data[1])


def test_control_has_no_faulty_twin():
    with pytest.raises(ValueError, match="ctl_lora is a healthy control"):
        PROGRAMS["ctl_lora"].make(0, faulty=True)


@pytest.mark.parametrize(
    "name", ["ips5_linreg_lr", "loop_frozen_params", pytest.param("ctl_gan_one_watch", marks=pytest.mark.slow)]
)
def test_watched_program_ends_bitwise_as_an_unwatched_one(name):
    program = PROGRAMS[name]
    ends = [
        run(program, 0, faulty=not program.is_control, make_watch=make)
        for make in (Unwatched, lambda m, o: Watch(m, o, rules="observe"))
    ]
    assert repr(ends[0].metric) == repr(ends[1].metric)


def a_run(program="p", *, faulty, metric, is_finite=True, alarms=(), seed=0):
    return Run(program, faulty, seed, metric, is_finite, dict.fromkeys(alarms, 3))


@pytest.mark.parametrize(
    ("faulty", "fixed", "is_finite", "shows"),
    [
        (0.90, 0.94, True, False),
        (0.85, 0.94, True, False),
        (0.84, 0.94, True, True),
        (0.94, 0.94, False, True),
        (0.40, 0.46, True, True),
        (-1.0, 0.2, True, True),
    ],
)
def test_fault_manifests_when_the_metric_is_worse_or_not_finite(faulty, fixed, is_finite, shows):
    got = manifests(a_run(faulty=True, metric=faulty, is_finite=is_finite), a_run(faulty=False, metric=fixed))
    assert got == shows


def test_score_counts_detections_diagnoses_and_false_alarms():
    programs = [PROGRAMS[n] for n in ("loop_stale_optimizer", "tdc_img_high_lr", "tdc_img_low_lr", "ctl_lora")]
    runs = {
        ("loop_stale_optimizer", 0, True): a_run(
            "loop_stale_optimizer", faulty=True, metric=0.1, alarms=["not_updating"]
        ),
        ("loop_stale_optimizer", 0, False): a_run("loop_stale_optimizer", faulty=False, metric=1.0),
        ("tdc_img_high_lr", 0, True): a_run("tdc_img_high_lr", faulty=True, metric=0.1, alarms=["constant_labels"]),
        ("tdc_img_high_lr", 0, False): a_run("tdc_img_high_lr", faulty=False, metric=1.0, alarms=["dead"]),
        ("tdc_img_low_lr", 0, True): a_run("tdc_img_low_lr", faulty=True, metric=0.5),
        ("tdc_img_low_lr", 0, False): a_run("tdc_img_low_lr", faulty=False, metric=1.0),
        ("ctl_lora", 0, False): a_run("ctl_lora", faulty=False, metric=1.0, alarms=["dead"]),
    }
    result = score(programs, runs)
    assert (result.num_manifest, result.control_alarms, result.num_controls) == (3, 1, 1)
    assert result.tpr == pytest.approx(2 / 3)
    assert result.fpr == pytest.approx(1 / 3)
    assert result.balanced_accuracy == pytest.approx(2 / 3)
    assert result.diagnosed == pytest.approx(1 / 2)
    assert result.false_alarms == {"dead": 2}
    assert [r.program for r in result.missed] == ["tdc_img_low_lr"]
    assert [r.program for r in result.undiagnosed] == ["tdc_img_high_lr"]
