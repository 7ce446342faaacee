"""All ranks go back to the same snapshot, or none does."""

import pytest

from tests.modes import rollback_cases
from tests.modes.ranks import run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = list(rollback_cases.CASES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return run_group("tests.modes.rollback_cases", 2, tmp_path_factory.mktemp("ranks"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_ranks(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]
