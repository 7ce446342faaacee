"""Whatever bytes a file holds, readers end in words, and nothing is missing in silence."""

import pytest

from .kind import all_kinds
from .run import fuzz, shares

KINDS = all_kinds()
NUMBERS = shares(KINDS, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files_end_in_words_and_nothing_is_missing_in_silence(kind, tmp_path):
    outcome = fuzz(kind, tmp_path / "slow", number=NUMBERS[kind.name], seed=1)
    assert not outcome.tracebacks, outcome.tracebacks[0]
    assert not outcome.silent, outcome.silent[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_damaged_files_end_in_words(kind, tmp_path):
    outcome = fuzz(kind, tmp_path / "few", number=6, seed=2)
    assert not outcome.tracebacks, outcome.tracebacks[0]
    assert not outcome.silent, outcome.silent[0]
