"""Every column and scalar is told of once, and all who name, draw or explain one read that."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import (
    FAMILIES,
    FIELDS,
    MODULE,
    PARAMETER,
    SCALAR,
    Column,
    Index,
    StepRecord,
    add_column,
    column_of,
    columns,
    is_scalar_name,
)
from gradwatch.records import _columns as table
from gradwatch.report import ReportData
from gradwatch.report._html import _payload
from gradwatch.rules import Rule
from gradwatch.rules.expression import is_column, is_scalar, parse
from gradwatch.testing import check_rule, odd_records

from . import everything

ROOT = Path(__file__).parents[2]
BUILT_IN = list(columns(own=False))
OF_RANKS = {
    "rank_spread",
    "ranks_alike",
    "replica_differs",
    "replica_gradients_differ",
    "replica_rank",
    "replicas_differ",
}
"""Written where there are several ranks, and seen by the tests of these."""
OF_FAULTS = {"recompute_rank"}
"""Written where a fault was found."""


@pytest.fixture(scope="module")
def written() -> set[str]:
    return set(everything.names(everything.records()))


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(table, "_OWN", {})
    column = Column(
        name="sharpness", kind=PARAMETER, meaning="How sharp it is.", label="sharpness of it", scale="linear"
    )
    add_column(column)
    return column


def test_what_the_engine_writes_is_in_the_table(written) -> None:
    unknown = {n for n in written if column_of(n) is None and not n.startswith(tuple(FAMILIES))}
    assert not unknown


def test_what_is_in_the_table_is_written(written) -> None:
    missing = {c.name for c in BUILT_IN} - written - set(FIELDS) - OF_RANKS - OF_FAULTS
    assert not missing


def test_every_family_is_written(written) -> None:
    assert not [family for family in FAMILIES if not any(name.startswith(family) for name in written)]


@pytest.mark.parametrize("column", BUILT_IN, ids=lambda c: c.name)
def test_a_column_is_told_in_one_sentence_and_is_a_word_of_expressions(column) -> None:
    assert re.fullmatch(r"[A-Z\d].*\.", column.meaning)
    assert is_scalar(column.name) == (column.kind == SCALAR) != is_column(column.name)
    parse(f"{column.name} > 0")


def test_the_page_and_the_script_are_made_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("made_columns", ROOT / "tools" / "columns.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for file, text in ((tool.PAGE, tool.page()), (tool.SCRIPT, tool.script())):
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `python tools/columns.py`"


def test_odd_records_hold_everything_that_a_rule_may_read(own) -> None:
    held = set(everything.names(odd_records()))
    assert not {c.name for c in columns()} - held - set(FIELDS)
    assert all(any(name.startswith(family) for name in held) for family in FAMILIES)


class Fragile(Rule):
    """Raises where a name is on record."""

    reads: str = ""

    def judge(self, record, state):
        if self.reads in record.columns or self.reads in record.scalars:
            raise ZeroDivisionError(self.reads)
        return self.clear(record), state


@pytest.mark.parametrize("name", [c.name for c in BUILT_IN if c.name not in FIELDS])
def test_the_laws_find_a_rule_that_fails_over_any_column(name) -> None:
    with pytest.raises(ZeroDivisionError):
        check_rule(Fragile(reads=name))


def test_the_laws_find_a_rule_that_needs_what_no_record_holds() -> None:
    class Misspelt(Rule):
        needs = frozenset({"grad_nrom"})

        def judge(self, record, state):
            return self.clear(record), state

    with pytest.raises(AssertionError, match="grad_nrom"):
        check_rule(Misspelt())


def report_of(*names: str) -> dict:
    index = Index.of_parameters(("a.weight", "b.weight"))
    held = {name: np.ones(2) for name in names}
    return _payload(ReportData.from_records([StepRecord(step=s, index=index, columns=held) for s in range(2)]), 10**6)


def test_a_report_shows_what_the_table_says_in_its_order() -> None:
    shown = [c.name for c in BUILT_IN if c.kind == PARAMETER and c.in_report]
    drawn = report_of(*(c.name for c in BUILT_IN if c.kind == PARAMETER), "unheard_of")["tables"]
    assert list(drawn) == [*shown, "unheard_of"]


def test_a_column_of_ones_own_is_a_word_and_is_explained_in_the_report(own) -> None:
    assert parse("sharpness > 1").per_path
    assert report_of("sharpness")["tables"]["sharpness"]["about"] == own.to_json()
    assert Column.from_json(json.loads(json.dumps(own.to_json()))) == own


def test_a_scalar_of_ones_own_is_a_word(own) -> None:
    add_column(Column(name="divergence", kind=SCALAR, meaning="How far it is."))
    assert not parse("divergence > 1").per_path
    assert is_scalar_name("val_anything")
    assert not is_scalar_name("diverge")


def test_a_column_of_ones_own_takes_no_name_that_is_built_in() -> None:
    for name, kind in (("grad_norm", PARAMETER), ("loss", SCALAR), ("val_x", MODULE)):
        with pytest.raises(ConfigError, match="built in"):
            add_column(Column(name=name, kind=kind, meaning="It is."))


@pytest.mark.parametrize(
    "wrong", [{"name": "a b"}, {"name": "a/b"}, {"kind": "layer"}, {"scale": "log"}], ids=lambda w: next(iter(w))
)
def test_a_column_that_can_not_be_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        Column(**{"name": "sharpness", "kind": PARAMETER, "meaning": "It is.", **wrong})


def test_the_meaning_of_underflow_names_the_smallest_normal_number() -> None:
    assert "smallest normal" in column_of("underflow_fraction").meaning
