"""Expression rules: what they mean, what they refuse, and hostile text."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch import ConfigError
from gradwatch.records import Finding
from gradwatch.rules import Expression, RuleBook, RuleEngine
from gradwatch.rules.expression import COLUMNS, FUNCTIONS, SCALARS, parse

from .series import INDEX, PARAMETERS, make_index, make_record, norms, run


def told(expression: str, *records: Any, **more: Any) -> list[tuple[int, str]]:
    """Return (step, path) of every finding."""
    engine = RuleEngine(RuleBook([Expression(expression, **more)]), on_error="raise")
    return [(f.step, f.path) for record in records for f in engine.judge(record).findings]


ONE = make_record(7, loss=2.0, lr=0.1, grad_norm=norms(1, 2, 3), val_loss=4.0, update_ratio=norms(0.1))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        pytest.param("grad_norm > 1.5", ["b.weight", "c.weight"], id="column-per-path"),
        pytest.param("loss > 1", [""], id="scalar-for-the-whole-model"),
        pytest.param("loss > 1 and step >= 7", [""], id="and"),
        pytest.param("loss < 1 or lr == 0.1", [""], id="or"),
        pytest.param("not loss < 1", [""], id="not"),
        pytest.param("1 < grad_norm < 3", ["b.weight"], id="chain"),
        pytest.param("-grad_norm + 2 ** 2 / 2 * 1 - 0 < 0.5", ["b.weight", "c.weight"], id="arithmetic"),
        pytest.param("log(abs(-grad_norm)) > sqrt(0.25)", ["b.weight", "c.weight"], id="elementwise"),
        pytest.param("max_over(grad_norm) == 3 and min_over(grad_norm) == 1", [""], id="extremes-over-paths"),
        pytest.param("mean_over(grad_norm) == 2 and median_over(grad_norm) == 2", [""], id="means-over-paths"),
        pytest.param("norm_over(grad_norm) ** 2 > 13.99", [""], id="norm-over-paths"),
        pytest.param("share_over(grad_norm > 1.5) > 0.6", [""], id="share-of-paths"),
        pytest.param("any_over(grad_norm > 2.5) and not all_over(grad_norm > 2.5)", [""], id="any-and-all"),
        pytest.param('max_over(over(grad_norm, "a.*", "b.*")) == 2', [""], id="over-restricts-a-value"),
        pytest.param('grad_norm > 0 and over("b.*")', ["b.weight"], id="over-as-a-claim"),
        pytest.param("grad_norm > max_over(grad_norm) - 0.5", ["c.weight"], id="path-against-roll-up"),
        pytest.param("update_ratio > 0", ["a.weight"], id="unmeasured-paths-are-not-judged"),
        pytest.param("output_rms > 0", [], id="unmeasured-column"),
        pytest.param("output_rms > 0 or loss > 1", [""] , id="or-is-settled-by-the-known-part"),
        pytest.param("val_accuracy > 0", [], id="any-validation-metric-is-a-name"),
        pytest.param("grad_norm / 0 > 1", list(PARAMETERS), id="division-by-zero-is-infinite"),
    ],
)  # fmt: skip
def test_expression_holds_where_it_says(expression: str, expected: list[str]) -> None:
    if expression.startswith("output_rms > 0 or"):
        expected = list(INDEX.paths)
    assert [path for _, path in told(expression, ONE)] == expected


def losses(*values: float) -> list[Any]:
    return [make_record(i, loss=v) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("expression", "values", "expected"),
    [
        pytest.param("loss > median(loss, 5)", [1, 1, 1, 1, 1, 2, 1], [5], id="median"),
        pytest.param("loss > mean(loss, 5)", [1, 1, 1, 1, 1, 2, 1.1], [5], id="mean-takes-what-was-flagged"),
        pytest.param("loss > max(loss, 3)", [1, 5, 1, 1, 1, 4, 1], [5], id="max-forgets"),
        pytest.param("loss < min(loss, 3)", [1, 1, 1, 0.5, 1], [3], id="min"),
        pytest.param("std(loss, 4) > 1", [0, 4, 0, 4, 0], [4], id="std"),
        pytest.param("loss > quantile(loss, 0.5, 5)", [1, 2, 3, 4, 5, 3.5], [5], id="quantile"),
        pytest.param("loss > 2 * ema(loss, 2)", [1, 1, 1, 3, 3], [3], id="ema"),
        pytest.param("loss > lag(loss, 2)", [1, 1, 2, 2, 2], [2, 3], id="lag"),
        pytest.param("rate(loss, 2) >= 1", [1, 1, 1, 3, 3], [3, 4], id="rate"),
        pytest.param("loss > 10 * median(loss, 5)", [1, 1, 1, 1, float("nan"), 1, 99], [6], id="nan-never-enters"),
    ],
)
def test_functions_of_the_past_never_see_the_present(expression: str, values: Any, expected: list[int]) -> None:
    assert [step for step, _ in told(expression, *losses(*values))] == expected


def test_windows_are_kept_per_path_and_count_measurements() -> None:
    records = [make_record(s, grad_norm=dict.fromkeys(PARAMETERS[: 1 + s % 2], 1.0)) for s in range(20)]
    records.append(make_record(20, grad_norm=norms(9, 9, 9)))
    # The third was never measured before: there is no past to compare with.
    assert told("grad_norm > 5 * median(grad_norm, 10)", *records) == [(20, "a.weight"), (20, "b.weight")]


def test_a_median_over_paths_equals_numpy_with_and_without_holes() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=3) for _ in range(40)]
    rows[33][1] = np.nan
    rule = Expression("grad_norm > quantile(grad_norm, 0.3, 10)")
    state = rule.init()
    for s, row in enumerate(rows):
        findings, state = rule.judge(make_record(s, grad_norm=norms(*row)), state)
        if s >= 12:
            for f in findings:
                i = PARAMETERS.index(f.path)
                # Of the last ten rows in which something was measured.
                assert f.limit == pytest.approx(np.nanquantile([r[i] for r in rows[s - 10 : s]], 0.3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an expression is a text such as 'grad_norm > 1'. Got ''."),
        ("grad_nrom > 1", "column 1: there is no column or scalar 'grad_nrom'. Did you mean 'grad_norm'"),
        ("1 < medain(loss, 3)", "column 5: there is no function 'medain'. Did you mean 'median'"),
        ("loss", "column 1: an expression is a comparison, such as `grad_norm > 1`; this gives a number."),
        ("  loss + > 1", "column 10: this can't be read"),
        ("loss.real > 1", "column 1: Attribute is not part of the language."),
        ("__import__('os').system('x') > 1", "column 1: only functions of the language can be called."),
        ("(lambda: 1)() > 1", "only functions of the language can be called."),
        ("[x for x in loss] > 1", "ListComp is not part of the language."),
        ("loss > 'a'", "column 8: 'a' is not a number."),
        ("loss > True", "column 8: 'True' is not a number."),
        ("loss > 1j", "is not a number."),
        ("loss @ lr > 1", "there is no operator MatMult; known are + - * / **."),
        ("loss is lr", "there is no comparison Is."),
        ("median(loss) > 1", "median is written median(x, n)."),
        ("median(loss, lr) > 1", "the number of measurements of median is a plain number."),
        ("median(loss, 1000000000) > 1", "is a whole number from 2 to 10000."),
        ("median(loss, 2.5) > 1", "is a whole number from 2 to 10000."),
        ("median(loss, n=3) > 1", "median takes its arguments by place."),
        ("quantile(loss, 3, 4) > 1", "a quantile lies between 0 and 1."),
        ("max_over(loss) > 1", "max_over goes over paths, and this has one value for all of them."),
        ("any_over(grad_norm)", "a comparison is needed here, this is a number."),
        ("(loss > 1) + 1 > 1", "a number is needed here, this is true or false."),
        ("loss > 1 and lr", "column 14: a comparison is needed here, this is a number."),
        ('over(loss, "a") > 1', "over chooses among paths"),
        ("over() and loss > 1", 'over takes patterns, `over("encoder.*")`'),
        ("loss > " + "(" * 400 + "1" + ")" * 400, "can't be read"),
        ("loss > " + "-" * 100 + "1", "parts are nested more than 40 deep."),
        ("loss > " + "+".join(["1"] * 900), "at most 300 parts"),
        ("loss > " + "1" * 3000, "at most 2000 characters"),
        ("loss\x00 > 1", "can't be read"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_language_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Expression(text)
    assert message in str(error.value)


SIGNS = [
    "(",
    ")",
    ",",
    "+",
    "-",
    "*",
    "**",
    "/",
    "<",
    ">",
    "==",
    "and",
    "or",
    "not",
    "0",
    "1",
    "5",
    "1e308",
    "9" * 50,
    "0.5",
]
OTHERS = [
    "200",
    '"*"',
    "lambda:",
    "__class__",
    ".",
    "[",
    "]",
    "{",
    "}",
    "if",
    "else",
    "f'{loss}'",
    ":=",
    "=",
    "await",
    "#",
]
WORDS = st.sampled_from(
    [*COLUMNS, *sorted(SCALARS)[:8], *FUNCTIONS, *SIGNS, *OTHERS, "*loss", "\\", "\n", "é", "😀", ";"]
)
TEXTS = st.one_of(
    st.text(max_size=80), st.lists(WORDS, max_size=25).map(" ".join), st.lists(WORDS, max_size=12).map("".join)
)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_hostile_text_is_a_config_error_or_a_rule_that_works(text: str) -> None:
    try:
        rule = Expression(text, name="x")
    except ConfigError:
        return
    state = rule.init()
    for step in range(3):
        findings, state = rule.judge(make_record(step, loss=2.0, grad_norm=norms(1, 2, 3)), state)
        assert all(isinstance(finding, Finding) for finding in findings)


@st.composite
def numbers(draw: Any, depth: int = 0) -> str:
    if depth > 3 or draw(st.booleans()):
        return draw(st.sampled_from(["grad_norm", "loss", "step", "3", "1e300", "update_ratio", "-1"]))
    a, b = draw(numbers(depth + 1)), draw(numbers(depth + 1))
    forms = [f"({a} + {b})", f"({a} ** {b})", f"({a} / {b})", f"log({a})", f"median({a}, 5)", f"ema({a}, 3)"]
    return draw(
        st.sampled_from([*forms, f"rate({a}, 2)", f"max_over({a} + grad_norm)", f'over({a} + grad_norm, "a*")'])
    )


@settings(max_examples=150, deadline=None)
@given(numbers(), numbers(), st.sampled_from(["<", ">=", "!="]))
def test_whatever_is_well_formed_can_be_judged_saved_and_gone_on_with(a: str, b: str, operator: str) -> None:
    try:
        rule = Expression(f"{a} {operator} {b}")
    except ConfigError:
        return
    records = [make_record(s, loss=float(s), grad_norm=norms(s, 2, -1), update_ratio=norms(s)) for s in range(8)]
    whole = RuleEngine(RuleBook([rule]), on_error="raise")
    for record in records:
        whole.judge(record)
    half = RuleEngine(RuleBook([rule]), on_error="raise")
    for i, record in enumerate(records):
        half.judge(record)
        if i == 4:
            state, half = half.state_dict(), RuleEngine(RuleBook([rule]), on_error="raise")
            half.load_state_dict(state)
    assert list(map(repr, whole.incidents)) == list(map(repr, half.incidents))


def test_no_text_takes_long_or_much_memory_to_be_refused() -> None:
    tracemalloc.start()
    begin = time.process_time()
    for text in [
        "9**9**9**9**9 > 1",
        "loss > " + "9" * 1900,
        "median(loss, 10000) > 1",
        "((((" * 400,
        "not " * 400 + "1 > 0",
    ]:
        try:
            rule = Expression(text)
        except ConfigError:
            continue
        rule.judge(ONE, rule.init())
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert time.process_time() - begin < 20


def test_too_much_to_remember_disables_the_rule_and_not_the_run() -> None:
    index = make_index([f"l{i}.w" for i in range(2000)], ())
    record = make_record(0, index, grad_norm=dict.fromkeys(index.paths, 1.0))
    with pytest.raises(ConfigError, match="median over 10000 measurements of 2000 paths"):
        run(Expression("grad_norm > median(grad_norm, 10000)"), [record])


def test_the_names_that_are_read_are_the_needs() -> None:
    assert Expression("max_over(update_ratio) > 1 and loss > lag(loss, 3)").wants == {"update_ratio", "loss"}
    assert parse("loss > 1") is parse("loss > 1")
