"""A rule that treats a step must be judged before it: it reads nothing that is known only after the step."""

import pytest

from gradwatch.book import PRESETS, load_rules
from gradwatch.rules import RULES, has_limit, treatments_of
from gradwatch.rules._slot import Slot


@pytest.mark.parametrize("preset", PRESETS)
def test_rules_of_presets_with_a_treatment_are_judged_before_the_step(preset: str) -> None:
    late = [rule.name for rule in load_rules(preset).rules if treatments_of(rule) and Slot(rule).is_late]
    assert not late


def test_rules_with_a_limit_of_their_own_are_judged_before_the_step() -> None:
    rules = [rule() for name, rule in RULES.items() if name != "expression"]
    limited = [rule for rule in rules if has_limit(rule)]
    assert "exploding" in {rule.name for rule in limited}
    assert not [rule.name for rule in limited if Slot(rule).is_late]
