"""`make mutants`: the tool that breaks the package must itself do what it says."""

import importlib.util
import json
import sys
import textwrap
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest

from tools.mutants.__main__ import todo
from tools.mutants._changes import Mutant, mutants_of, named_mutant
from tools.mutants._forked import Run, forked, some_cases
from tools.mutants._judging import Job, Judging
from tools.mutants._map import TestMap as LineMap
from tools.mutants._page import read
from tools.mutants._patch import Live, UnpatchableError, rebind
from tools.mutants._pick import pick
from tools.mutants._score import Results

CASES = {
    "comparison": ("return a < b", {"return a <= b", "return a >= b", "return None"}),
    "identity": ("return a is not None", {"return a is None", "return None"}),
    "and": ("return a and (b or c)", {"return a or (b or c)", "return a and (b and c)", "return None"}),
    "arithmetic": ("return (a + b) * c", {"return (a - b) * c", "return (a + b) / c", "return None"}),
    "words": ("a = 'x' + b", set()),
    "sorted": ("a = sorted(b, key=c)", {"a = list(b)"}),
    "bounds": ("a = b[c:d]", {"a = b[:d]", "a = b[c:]"}),
    "constant": ("a = b + 1", {"a = b - 1", "a = b + 2", "a = b + 0"}),
    "call": ("a.b(c)", {"pass"}),
    "state": ("a.b = c", {"pass"}),
    "local": ("a = c", set()),
    "early": ("if a:\n    return", {"if not (a):", "pass"}),
    "loop": ("while a:\n    break", {"while not (a):", "continue", "pass"}),
    "text": ("f'{a + 1}'\nassert a == 1\nb: int | None = c", {"pass"}),
}


def in_function(body: str) -> str:
    return "def f(a, b, c, d):\n" + textwrap.indent(body, "    ") + "\n"


@pytest.mark.parametrize("case", CASES)
def test_the_changes_of_a_statement(case: str) -> None:
    body, expected = CASES[case]
    text = in_function(body)
    found = mutants_of("f.py", text)
    assert {m.change.partition(" => ")[2] for m in found} == expected
    assert all(m.text != text and m.compiles and m.function == "f" for m in found)
    assert all(m.text.count("\n") == text.count("\n") for m in found)


def test_a_change_is_known_by_its_text_wherever_it_stands() -> None:
    text = in_function("return a < b")
    keys = {m.key for m in mutants_of("f.py", text)}
    assert {m.key for m in mutants_of("f.py", "import os\n\n\n" + text)} == keys
    twice = in_function("if a < b:\n    c()\nif a < b:\n    d()")
    found = [m.key for m in mutants_of("f.py", twice)]
    assert len(found) == len(set(found))


def test_what_runs_at_import_is_told_apart() -> None:
    found = mutants_of(
        "f.py", "LIMIT = 10\n\n\nclass A:\n    size: int = 3\n\n    def f(self, n=2):\n        return n\n"
    )
    assert {(m.name, m.at_import) for m in found} == {("LIMIT", True), ("size", True), ("f()", True), ("", False)}


def test_a_named_change_must_be_found_once() -> None:
    text = in_function("a()\na()\nb()")
    assert named_mutant("f.py", text, "f", "b()", "").function == "f"
    for old, times in (("a()", 2), ("nothing", 0)):
        with pytest.raises(LookupError, match=f"stands {times} times"):
            named_mutant("f.py", text, "f", old, "pass")
    with pytest.raises(LookupError, match="no function 'g'"):
        named_mutant("f.py", text, "g", "b()", "pass")


def test_a_map_of_tests_follows_the_lines_of_a_file_that_changed() -> None:
    drawn = LineMap({"f.py": "a\nb\nc\n"}, {"t": {"f.py": 1 << 1 | 1 << 3}}, {"t": 1.0}, {})
    drawn.moved_to({"f.py": "new\na\nnew\nb\nc\n"})
    assert [n for n in range(1, 6) if drawn.running([("f.py", n, n)])] == [2, 5]


def test_a_map_of_tests_follows_code_to_another_file() -> None:
    part = "def f():\n    one()\n    two()\n    three()\n"
    drawn = LineMap({"f.py": "a\n" + part, "g.py": "b\n"}, {"t": {"f.py": 1 << 1 | 1 << 4}}, {"t": 1.0}, {})
    drawn.moved_to({"f.py": "a\n", "g.py": "b\n", "h.py": "c\n" + part})
    assert {(file, n) for file in "fgh" for n in range(1, 6) if drawn.running([(f"{file}.py", n, n)])} == {
        ("f", 1),
        ("h", 4),
    }


def test_the_quickest_case_of_each_test_comes_first() -> None:
    seconds = {"t::a[1]": 1.0, "t::a[2]": 2.0, "t::b": 5.0}
    drawn = LineMap({}, {name: {"f.py": 2} for name in seconds}, seconds, {})
    assert drawn.running([("f.py", 1, 1)]) == ["t::a[1]", "t::b", "t::a[2]"]


def test_the_test_that_runs_little_else_comes_before_quicker_ones_that_only_pass_by() -> None:
    seconds = (
        {f"t::passes[{i}]": 0.01 for i in range(9)} | {f"t::passes{i}": 0.01 * i for i in range(9)} | {"u::law": 3.0}
    )
    lines = {name: {"f.py": 0b110, "g.py": (1 << 500) - 1} for name in seconds} | {"u::law": {"f.py": 0b110}}
    assert "u::law" in LineMap({}, lines, seconds, {}).running([("f.py", 1, 1)])[:3]


SOURCE = """
from functools import wraps

def timed(function):
    @wraps(function)
    def wrapper(n):
        return function(n) + 10
    return wrapper

class A:
    @timed
    def f(n):
        return [i + 1 for i in range(n)][-1]

    @property
    def g(self):
        return 1
"""


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [("+ 10", "+ 20", (22, 1)), ("i + 1", "i + 5", (16, 1)), ("return 1\n", "return 7\n", (12, 7))],
    ids=["closure", "decorated", "property"],
)
def test_living_functions_take_their_new_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, result: tuple[int, int]
) -> None:
    path = str(tmp_path / "f.py")
    module = types.ModuleType("f_of_mutants")
    module.__file__, space = path, vars(module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(SOURCE, path, "exec", dont_inherit=True), space)
    live = Live(str(tmp_path))
    live.patch(path, SOURCE, SOURCE.replace(old, new), "A")
    assert (space["A"].f(2), space["A"]().g) == result


def test_functions_that_begin_in_one_line_are_not_taken_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = "pair = (lambda n: n + 1), (lambda n: n + 2)\n", str(tmp_path / "f.py")
    module = types.ModuleType("f_of_mutants")
    module.__file__ = path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    with pytest.raises(UnpatchableError, match="2 functions <lambda> begin in line 1"):
        Live(str(tmp_path)).patch(path, source, source.replace("n + 2", "n + 3"), "")
    assert [each(0) for each in module.pair] == [1, 2]


def test_every_change_with_a_name_is_found_in_the_package() -> None:
    root = Path(__file__).parents[1]
    named = pick(root, 0)
    assert len(named) >= 25
    assert all(m.compiles and m.tests and m.text != (root / m.file).read_text() for m in named)


@pytest.mark.parametrize(
    ("old", "new", "function", "result"),
    [
        ("LIMIT = 10", "LIMIT = 11", "", (11, 5, 1)),
        ("*, n=5", "*, n=6", "f", (10, 6, 1)),
        ("m=1", "m=2", "f", (10, 5, 2)),
    ],
    ids=["constant", "keyword", "positional"],
)
def test_constants_and_defaults_are_bound_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, function: str, result: tuple[int, ...]
) -> None:
    path, source = tmp_path / "f.py", "LIMIT = 10\n\n\ndef f(k, m=1, *, n=5):\n    return LIMIT, n, m\n"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("f_of_mutants", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "f_of_mutants", module)
    spec.loader.exec_module(module)
    rebind(str(path), source, source.replace(old, new), function, Live(str(tmp_path)))
    assert module.f(0) == result


@pytest.mark.parametrize(
    ("killed", "reason", "code"),
    [(19, True, 0), (19, False, 1), (16, True, 1)],
    ids=["explained", "without-a-reason", "too-many-survive"],
)
def test_the_command_fails_on_a_survivor_without_a_reason_and_below_the_least_score(
    tmp_path: Path, killed: int, reason: bool, code: int
) -> None:
    mutants = [Mutant("f.py", "f", f"a{i} => b", "deleted", i, "") for i in range(20)]
    results = [{"key": m.key, "killed": i < killed, "why": "t"} for i, m in enumerate(mutants)]
    (tmp_path / "results").write_text("\n".join(map(json.dumps, results)))
    reasons = [{"file": "f.py", "function": "f", "change": m.change, "reason": "the same"} for m in mutants[killed:]]
    (tmp_path / "reasons").write_text(json.dumps(reasons if reason else []))
    assert Results(tmp_path / "results", tmp_path / "reasons").tell(mutants) == code


def test_of_many_cases_some_are_run_spread_over_all() -> None:
    items = [types.SimpleNamespace(nodeid=f"t::many[{i}]") for i in range(300)]
    items.insert(7, types.SimpleNamespace(nodeid="t::one"))
    kept = [item.nodeid for item in some_cases(items, 3)]
    assert kept == ["t::many[0]", "t::one", "t::many[100]", "t::many[200]"]
    assert some_cases(items, 300) == some_cases(items, 3, ["many"]) == items
    assert "t::many[299]" in [item.nodeid for item in some_cases(items, 3, also=["t::many[299]"])]


@pytest.mark.parametrize(
    ("option", "expected"),
    [("", ["a", "b", "c"]), ("resume", ["c"]), ("survivors", ["c", "b"]), ("tell", [])],
)
def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path, option: str, expected: list[str]) -> None:
    mutants = [Mutant("f.py", "f", change, "deleted", 1, "") for change in "abc"]
    found = [{"key": m.key, "killed": m.change == "a", "why": "t"} for m in mutants[:2]]
    (tmp_path / "results").write_text("\n".join(map(json.dumps, found)))
    (tmp_path / "reasons").write_text("")
    results = Results(tmp_path / "results", tmp_path / "reasons")
    assert [m.change for m in todo(mutants, results, option)] == expected


CHANGES = {
    "killed": Mutant("f.py", "A.f", "a | b => a & b", "arithmetic", 1, ""),
    "elsewhere": Mutant("f.py", "A.f", "a('x | `y`') => pass", "deleted", 2, ""),
    "hung": Mutant("f.py", "", "N = 1 => N = 2", "constant", 3, ""),
    "survived": Mutant("g.py", "f", "a => b", "return", 1, ""),
    "new": Mutant("g.py", "f", "a => None", "return", 1, ""),
}
WHYS = {"killed": "tests/test_f.py::test_f[a | `b`-1]", "elsewhere": "tests/test_f.py::T::test_g", "hung": "hung"}


def results_of(folder: Path, page: Path, *names: str) -> Results:
    lines = [{"key": CHANGES[n].key, "killed": n in WHYS, "why": WHYS.get(n, "passed: 3 of 5 tests")} for n in names]
    (folder / "results").write_text("\n".join(map(json.dumps, lines)))
    change = CHANGES["survived"]
    (folder / "reasons").write_text(
        json.dumps([{"file": change.file, "function": change.function, "change": change.change, "reason": "a | b"}])
    )
    return Results(folder / "results", folder / "reasons", read(page, folder))


def test_the_page_is_read_back_as_it_was_written_but_for_tests_that_are_gone(tmp_path: Path) -> None:
    tests, page = tmp_path / "tests" / "test_f.py", tmp_path / "page.md"
    tests.parent.mkdir()
    tests.write_text("def test_f():\n    pass\n\nclass T:\n    def test_g(self):\n        pass\n")
    everything = list(CHANGES.values())
    page.write_text(results_of(tmp_path, page, *WHYS, "survived").page(everything, "make"))
    again = results_of(tmp_path, page)
    assert again.page(everything, "make") == page.read_text()
    assert todo(everything, again, "resume") == [CHANGES["new"]]
    assert todo(everything, again, "survivors") == [CHANGES["new"], CHANGES["survived"]]
    assert [m.seen_by for m in again.with_tests(everything)] == [WHYS["killed"], WHYS["elsewhere"], "", "", ""]
    assert again.tell(everything) == 1  # one has not been judged
    tests.write_text("def test_f():\n    pass\n")
    assert todo(everything, results_of(tmp_path, page), "resume") == [CHANGES["elsewhere"], CHANGES["new"]]


def test_what_is_judged_anew_counts_instead_of_what_the_page_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(results_of(tmp_path, page, "hung", "survived").page(list(CHANGES.values()), "make"))
    results = results_of(tmp_path, page, "hung")
    results.forget([CHANGES["hung"], CHANGES["survived"]])
    assert [name for name, change in CHANGES.items() if results.is_known(change)] == []


@pytest.mark.parametrize("still", [True, False], ids=["notices", "notices-no-more"])
def test_the_test_that_noticed_last_time_is_asked_first_and_the_others_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still: bool
) -> None:
    asked: list[list[str]] = []

    def run_broken(mutant: Mutant, names: list[str]) -> Run:
        asked.append(list(names))
        return Run(failed=names[-1] if still or len(names) > 1 else "")

    mutant = replace(CHANGES["killed"], seen_by="t::b", first=1, last=1)
    judging = Judging(Job([mutant], tmp_path, (), (), tmp_path / "map", tmp_path / "results"))
    judging.runner = types.SimpleNamespace(items={"t::a": None, "t::b": None})
    lines = {name: {"f.py": 2} for name in judging.runner.items}
    drawn = LineMap({}, lines, dict.fromkeys(lines, 1.0), {})
    monkeypatch.setattr(judging, "_draw_map", lambda: setattr(judging, "map", drawn))
    monkeypatch.setattr(judging, "_run_broken", run_broken)
    monkeypatch.setattr(judging, "_is_sound", lambda failed, names: True)
    assert judging._judge(mutant) == {"killed": True, "why": "t::b"}
    assert asked == ([["t::b"]] if still else [["t::b"], ["t::a", "t::b"]])


@pytest.mark.parametrize(
    ("before", "after", "test", "noticed"),
    [
        ("N = 1", "N = 2", "test_f[1]", "test_n.py::test_f[1]"),
        ("N = 1", "N = 1 + 0", "test_f[1]", ""),
        ("N = 1", "N = 2", "test_f[gone]", ""),
        ("N = 3", "N = 2", "test_f[1]", ""),
        ("N = 1", "1 / 0", "test_f[1]", "died at import"),
    ],
    ids=["fails", "passes", "no-such-case", "fails-on-the-whole-code-too", "no-import"],
)
def test_a_test_in_a_process_of_its_own_notices_where_it_fails_and_passes_on_the_whole_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, test: str, noticed: str
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "f.py").write_text(before)
    (tmp_path / "test_n.py").write_text(
        "import pytest\nfrom f import N\n\n@pytest.mark.parametrize('n', [1])\ndef test_f(n):\n    assert N == n\n"
    )
    mutant = Mutant("f.py", "", f"{before} => {after}", "constant", 1, after)
    judging = Judging(Job([mutant], tmp_path, (), (), tmp_path / "map", tmp_path / "results"))
    judging.sources = {"f.py": before}
    assert judging._noticed_far(mutant, [f"test_n.py::{test}"]) == noticed


@pytest.mark.parametrize("work", ["sleeps", "spins"])
def test_what_takes_no_time_of_a_processor_or_too_much_hangs(work: str) -> None:
    def forever() -> None:
        while True:
            if work == "sleeps":
                time.sleep(0.05)

    assert forked(forever, limit=0.5) == "hung"
    assert forked(lambda: 7, limit=60.0) == 7
