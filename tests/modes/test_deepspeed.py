"""DeepSpeed's ZeRO on two ranks, against one process in float64: `make test-deepspeed` installs what it needs."""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.modes import deepspeed_cases
from tests.modes.deepspeed_resume import plain
from tests.modes.ranks import run_group
from tests.modes.reference import Net
from tests.modes.test_resume import goes_on_as, never_cut_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed: `make test-deepspeed`, or pip install --no-build-isolation 'gradwatch[deepspeed]'",
    ),
]

BUILD = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
LOCK = (
    "DeepSpeed's operator for shared memory was not built in {} s. A build that was broken off leaves a file `lock` in "
    "torch's cache of extensions (~/.cache/torch_extensions/*/deepspeed_shm_comm), on which the next one waits for ever"
)
GROUPS = {
    key: tuple(name for name in deepspeed_cases.CASES if name.startswith(key))
    for key in ("zero-0", "zero-1", "zero-2", "zero-3")
}


@pytest.fixture(scope="module")
def built() -> None:
    """Build what DeepSpeed compiles at its first start."""
    seconds = 900
    try:
        env = {**os.environ, "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", BUILD], env=env, check=True, timeout=seconds, capture_output=True)
    except subprocess.TimeoutExpired:
        pytest.fail(LOCK.format(seconds))


@pytest.fixture(scope="module")
def outcomes(built, tmp_path_factory):
    """Start the processes of a stage once."""

    @cache
    def of_stage(stage: str) -> dict[str, str]:
        names = list(GROUPS[stage])
        return run_group("tests.modes.deepspeed_cases", 2, tmp_path_factory.mktemp("ranks"), names, timeout=1200)

    return of_stage


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in GROUPS.items() for name in names])
def test_deepspeed(stage: str, name: str, outcomes) -> None:
    found = outcomes(stage)
    assert not found[name], found[name]


RESUMED = {n: [f"{what}-zero-{n}" for what in ("save", "resume")] for n in (1, 2, 3)}


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-2")
    wrong = run_group("tests.modes.deepspeed_resume", 2, folder, [save for save, _ in RESUMED.values()], timeout=600)
    assert not any(wrong.values()), wrong
    return folder


@pytest.fixture(scope="module")
def resumed(saved, tmp_path_factory):
    @cache
    def by(world: int) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp(f"resumed-by-{world}")
        for save, resume in RESUMED.values():
            (folder / resume).mkdir()
            (folder / resume / "saved").symlink_to(saved / save / "saved")
        names = [resume for _, resume in RESUMED.values()]
        return folder, run_group("tests.modes.deepspeed_resume", world, folder, names, timeout=600)

    return by


@pytest.fixture(scope="module")
def never_cut():
    return never_cut_of(Net().double(), plain)


@pytest.mark.parametrize("stage", RESUMED)
@pytest.mark.parametrize("after", [1, 4])
def test_zero_goes_on_with_another_number_of_ranks(stage: int, after: int, resumed, never_cut) -> None:
    folder, wrong = resumed(after)
    name = RESUMED[stage][1]
    assert not wrong[name], wrong[name]
    goes_on_as(never_cut, folder / name, rel=1e-3)
