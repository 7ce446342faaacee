"""DeepSpeed's ZeRO on two ranks, against one process in float64: `make test-deepspeed` installs what it needs."""

import importlib.util
import os
import subprocess
import sys
from functools import cache

import pytest

from tests.modes import deepspeed_cases
from tests.modes.ranks import run_group

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
def outcomes(tmp_path_factory):
    """Build what DeepSpeed compiles at its first start, then start the processes of a stage once."""
    seconds = 900
    try:
        env = {**os.environ, "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", BUILD], env=env, check=True, timeout=seconds, capture_output=True)
    except subprocess.TimeoutExpired:
        pytest.fail(LOCK.format(seconds))

    @cache
    def of_stage(stage: str) -> dict[str, str]:
        names = list(GROUPS[stage])
        return run_group("tests.modes.deepspeed_cases", 2, tmp_path_factory.mktemp("ranks"), names, timeout=1200)

    return of_stage


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in GROUPS.items() for name in names])
def test_deepspeed(stage: str, name: str, outcomes) -> None:
    found = outcomes(stage)
    assert not found[name], found[name]
