"""The table of what works where says what the tests say."""

from importlib import import_module

import pytest

from .table import COLUMNS, PAGE, ROWS, rewritten


def test_the_page_holds_the_table_as_it_is_made() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run: python -m tests.callbacks.table"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_cell_stands_on_a_test_that_exists(row) -> None:
    _, cells, tests = row
    assert set(cells) == set(COLUMNS)
    if isinstance(tests, str):
        function = named(tests)
        ids = [list(m.args[1]) for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
        # Over the adapters by its ids, or in a loop over all of them.
        assert any(list(COLUMNS) == i for i in ids) or "ADAPTERS" in function.__code__.co_names
    else:
        assert set(tests) <= set(COLUMNS)
        for test in tests.values():
            named(test)


def named(test: str):
    module, _, name = test.partition(":")
    return getattr(import_module(f"tests.callbacks.{module}"), name)
