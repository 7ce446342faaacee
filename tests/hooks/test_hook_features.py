"""The table of features and behaviours reaches its goals."""

import pytest

from benchmarks.hook_features import GOALS, run


@pytest.mark.slow
def test_features_and_behaviours_of_other_hook_systems_are_there():
    for table, found in run().items():
        missing = [f"{source}: {name}: {reason}" for source, name, reason in found if reason]
        assert len(found) >= 126
        assert 1 - len(missing) / len(found) >= GOALS[table], "\n".join(missing)
