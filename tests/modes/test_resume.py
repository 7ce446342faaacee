"""A run saved by some ranks and gone on with by more or fewer shows what one that was never cut would have shown."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gradwatch.treatments import ZClip
from tests.modes.pipeline_cases import Deep
from tests.modes.ranks import run_group
from tests.modes.reference import Net, sgd
from tests.modes.resume_cases import NOT_FINITE, SAVED_AFTER, SPIKES, STEPS, go, told, watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @cache
    def by(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"saved-by-{world}")
        names = ["save", "save-flat"] + (["save-stages"] if world > 1 else [])
        wrong = run_group("tests.modes.resume_cases", world, folder, names)
        assert not any(wrong.values()), wrong
        return folder

    return by


@pytest.fixture(scope="module")
def resumed(saved, tmp_path_factory):
    @cache
    def by(before: int, after: int) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp(f"resumed-by-{after}")
        for name in ("save", "save-flat"):
            place = folder / name.replace("save", "resume")
            place.mkdir()
            (place / "saved").symlink_to(saved(before) / name / "saved")
        return folder, run_group("tests.modes.resume_cases", after, folder, ["resume", "resume-flat"])

    return by


def never_cut_of(net: nn.Module, make: Callable[[nn.Module], Any] = sgd):
    """One process in float64 over the whole batches, with norms by arithmetic of its own."""
    optimizer = make(net)
    watch = watched(net, optimizer, ZClip(warmup=20))
    norms = [
        [float(p.grad.square().sum().sqrt()) for p in net.parameters()]
        for _ in go(net, watch, optimizer, range(STEPS), 0, 1)
    ]
    watch.close()
    return told(watch), norms


@pytest.fixture(scope="module")
def never_cut():
    return never_cut_of(Net().double())


@pytest.fixture(scope="module")
def deep_and_never_cut():
    return never_cut_of(Deep().double())


def near(a: float, b: float, rel: float) -> bool:
    return math.isclose(a, b, rel_tol=rel) or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("case", ["resume", "resume-flat"], ids=["fsdp2", "fsdp1"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2)], ids=lambda n: str(n))
def test_fsdp_goes_on_with_another_number_of_ranks(before: int, after: int, case: str, resumed, never_cut) -> None:
    folder, wrong = resumed(before, after)
    assert not wrong[case], wrong[case]
    goes_on_as(never_cut, folder / case)


@pytest.mark.parametrize(
    ("before", "case", "after"),
    [
        (4, "resume-whole", 1),
        (2, "resume-in-1-stages", 1),
        (4, "resume-in-2-stages", 2),
        (2, "resume-in-2-stages", 4),
        (4, "resume-in-4-stages", 4),
    ],
)
def test_pipelines_go_on_in_another_number_of_stages(
    before: int, case: str, after: int, saved, deep_and_never_cut, tmp_path
) -> None:
    (tmp_path / case).mkdir()
    (tmp_path / case / "saved").symlink_to(saved(before) / "save-stages" / "saved")
    wrong = run_group("tests.modes.resume_cases", after, tmp_path, [case])
    assert not wrong[case], wrong[case]
    goes_on_as(deep_and_never_cut, tmp_path / case)


def goes_on_as(never_cut, folder: Path, *, rel: float = 1e-6) -> None:
    """Assert that what was seen after the cut is what a training shows that was never cut."""
    seen = json.loads((folder / "seen.json").read_text())
    wanted, norms = never_cut

    assert seen["num_steps"] == wanted["num_steps"] == STEPS
    assert seen["num_skipped"] == wanted["num_skipped"] == len(NOT_FINITE)
    assert seen["incidents"] == json.loads(json.dumps(wanted["incidents"]))
    assert [step["step"] for step in seen["steps"]] == list(range(SAVED_AFTER, STEPS))
    for got, want in zip(seen["steps"], wanted["steps"][SAVED_AFTER:], strict=True):
        assert (got["skipped"], got["treated"]) == (want["skipped"], [list(t) for t in want["treated"]])
        step = got["step"]
        assert all(near(a, b, rel) for a, b in zip(got["norms"][1:], norms[step], strict=True)), step
        assert near(got["norms"][0], math.hypot(*norms[step]), rel), step
        for key in ("after", "limit", "loss"):
            assert near(got[key], want[key], rel), (step, key, got[key], want[key])


def test_the_run_that_was_never_cut_has_incidents_on_both_sides_of_the_cut(never_cut) -> None:
    wanted, _ = never_cut
    ended = {(rule, first): STEPS if over is None else over for rule, first, _, over, *_ in wanted["incidents"]}
    assert set(ended) == {("exploding", s) for s in SPIKES} | {("non_finite", s) for s in NOT_FINITE}
    assert ended["non_finite", 1] < SAVED_AFTER < ended["exploding", 28]
    limits = [step["limit"] for step in wanted["steps"]]
    # Known since the stretch of sixteen steps that begins behind the cut, and compared there.
    assert not any(map(math.isnan, limits[-(STEPS % 16) :]))
