"""Ranks whose numbers come to each in its own time do the same at the same step."""

import pytest

from tests.late import rank_cases
from tests.late.device import is_there
from tests.modes.ranks import run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = list(rank_cases.CASES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    if not is_there():
        pytest.skip("needs the late device")
    return run_group("tests.late.rank_cases", 2, tmp_path_factory.mktemp("ranks"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_that_know_at_different_times_decide_alike(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]
