"""The page of modes lists the tests that there are."""

from tools import modes_table


def test_the_table_in_the_docs_is_made_from_the_tests() -> None:
    assert modes_table.PAGE.read_text() == modes_table.page(), "run `python tools/modes_table.py`"
