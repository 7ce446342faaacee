"""Laws that every rule keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, GradwatchError
from ..records import (
    FAMILIES,
    FIELDS,
    MODULE,
    PARAMETER,
    SCALAR,
    SEVERITIES,
    Column,
    Finding,
    Index,
    StepRecord,
    column_of,
    columns,
    is_scalar_name,
)
from ..rules import Rule, RuleBook, RuleEngine, as_rule

__all__ = ["check_rule", "odd_records"]

_ODD = (0.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))


def check_rule(rule: Rule, records: Iterable[StepRecord] = ()) -> None:
    """Raise where a rule breaks a law that gradwatch relies on.

    * `init` gives equal memories, of plain values and numpy arrays alone;
    * `judge` is pure: the same record and memory give the same findings and memory, and change neither;
    * nothing that a record may hold makes it raise: missing columns, no loss, nan, infinities, empty masks;
    * findings name paths of the record's index (or "": the whole model), and this record's step;
    * `limit` is None or a number that is not negative;
    * what it says it `needs` is what a record can hold;
    * its memory survives a checkpoint: judging goes on as if nothing had happened.

    Args:
        rule: set up as it will be used.
        records: more records to judge, such as those that shall make it fire. Some 60 odd ones are judged anyway.

    Raises:
        AssertionError: which law, and what was seen.
    """
    try:
        rule = as_rule(rule)
    except ConfigError as error:
        raise AssertionError(f"broken law: {error}") from None
    judged = [*odd_records(), *records]
    _has_its_names(rule)
    _inits_alike(rule)
    state = rule.init()
    for record in judged:
        state = _judge_purely(rule, record, state)
    _survives_a_checkpoint(rule, judged)


def odd_records(steps: int = 60, seed: int = 0) -> list[StepRecord]:
    """Return records of an ordinary training, of which every third lacks something or holds what is not finite.

    Together they hold every column and scalar that is known, those of one's own included.
    """
    random = np.random.default_rng(seed)
    index = _index()
    records = []
    for step in range(steps):
        odd = _ODD[(step // 3) % len(_ODD)] if step % 3 == 2 else None
        records.append(_record(step, index, random, odd))
    return [*records, StepRecord(step=steps, index=index, has_loss=False, scalars={"end_of_run": 1.0})]


def _index() -> Index:
    paths = ("0.weight", "0.bias", "2.weight", "2.bias", "0", "1", "2")
    return Index(
        paths=paths,
        kinds=("parameter",) * 4 + ("module",) * 3,
        numel=np.array([20, 5, 15, 3, 0, 0, 0]),
        shapes=((5, 4), (5,), (3, 5), (3,), (), (), ()),
        depth=np.array([0, 0, 2, 2, 0, 1, 2]),
        types=("Linear", "Linear", "Linear", "Linear", "Linear", "ReLU", "Linear"),
        in_optimizer=np.array([True] * 4 + [False] * 3),
    )


def _record(step: int, index: Index, random: np.random.Generator, odd: float | None) -> StepRecord:
    n = len(index)
    due = [] if step % 7 == 6 else [c for c in columns(PARAMETER, MODULE) if step % 5 == 0 or c.when != "updates_every"]
    held: dict[str, Any] = {c.name: _values(c, random, n) for c in due}
    masks: dict[str, Any] = {c.name: index.is_module if c.kind == MODULE else index.is_parameter for c in due}
    if odd is not None:
        for name in held:
            held[name] = np.where(random.random(n) < 0.5, odd, held[name])
        masks = {name: mask & (random.random(n) < 0.5) for name, mask in masks.items()}
    loss = 2.0 * math.exp(-step / 30) if odd is None else odd
    norm = float(np.linalg.norm(held["grad_norm"][:4])) if held and odd is None else (odd or 0.0)
    return StepRecord(
        step=step,
        index=index,
        loss=loss,
        has_loss=step % 11 != 10,
        lr=0.0 if step == 4 else 1e-3,
        global_norm=norm,
        global_norm_after=norm,
        columns=held,
        masks=masks,
        scalars={} if step % 13 == 12 else _scalars(step, odd),
    )


def _values(column: Column, random: np.random.Generator, n: int) -> Any:
    if column.scale == "share":
        return random.random(n)
    if column.scale == "count":
        return np.zeros(n)
    return random.normal(size=n) if column.signed else np.exp(random.normal(size=n))


_RARE = ("amp_overflow", "grad_scale", "num_overflows", "grads_kept", "shape_mismatch", "optimizer", "trainer_clip")
"""Scalars whose being there changes what is expected of a step: in some records only, and zero."""


def _scalars(step: int, odd: float | None) -> dict[str, float]:
    names = [c.name for c in columns(SCALAR) if c.name not in (*FIELDS, *_RARE, "end_of_run")]
    names += [f"{family.rstrip('_/')}/a/b" if "/" in family else f"{family}a" for family in FAMILIES]
    found = dict.fromkeys(names, 0.5 if odd is None else odd)
    ordinary = {"batch_size": 8.0, "num_trainable": 4.0, "output_min": -1.0, "output_max": 1.0, "output_units": 3.0}
    if odd is None:
        found |= ordinary
    return found | (dict.fromkeys(_RARE, 0.0) if step % 4 == 1 else {})


def _has_its_names(rule: Rule) -> None:
    name = type(rule).__name__
    _law(rule.severity in SEVERITIES, f"{name}'s severity is one of {', '.join(SEVERITIES)}. It is {rule.severity!r}")
    unknown = sorted(n for n in rule.needs if not _is_known(n))
    _law(not unknown, f"{name} needs what a record can hold. Of {unknown} nothing is known")
    _law(rule.rule_name == rule.rule_name.lower() and " " not in rule.rule_name, f"{name}'s rule_name is in snake case")


_PARTS = frozenset({"treatments", "histograms", "skipped", "unseen"})
"""What else of a record a rule may need."""


def _is_known(name: str) -> bool:
    return name in _PARTS or column_of(name) is not None or is_scalar_name(name) or f"{name}/" in FAMILIES


def _inits_alike(rule: Rule) -> None:
    first, second = rule.init(), rule.init()
    _law(
        _equal(first, second), f"{rule.name}: init() gives the same memory each time. It gave {first!r} and {second!r}"
    )
    _law(_is_plain(first), f"{rule.name}: init() gives plain values and numpy arrays. It gave {first!r}")


def _judge_purely(rule: Rule, record: StepRecord, state: Any) -> Any:
    where = f"{rule.name} at step {record.step}"
    before, settings, columns = copy.deepcopy(state), repr(rule), {k: v.copy() for k, v in record.columns.items()}
    findings, after = rule.judge(record, state)
    findings = list(findings)
    _law(_equal(state, before), f"{where}: judge() leaves the memory it was given as it was, and returns a new one")
    _law(repr(rule) == settings, f"{where}: judge() leaves the rule's settings as they were")
    _law(_equal(dict(record.columns), columns), f"{where}: judge() leaves the record as it was")
    again, after_again = rule.judge(record, state)
    _law(_equal(list(map(_as_tuple, findings)), list(map(_as_tuple, again))), f"{where}: judge() finds the same again")
    _law(_equal(after, after_again), f"{where}: judge() returns the same memory again")
    _law(_is_plain(after), f"{where}: the memory is plain values and numpy arrays. It is {after!r}")
    for finding in findings:
        _law(finding.step == record.step, f"{where}: findings carry the record's step. One has {finding.step}")
        known = not finding.path or finding.path in record.index.positions
        _law(known, f"{where}: findings name paths of the index. One names {finding.path!r}")
    limit = rule.limit(after)
    _law(limit is None or limit >= 0, f"{where}: limit() is None or a number that is not negative. It is {limit!r}")
    return after


def _survives_a_checkpoint(rule: Rule, records: Sequence[StepRecord]) -> None:
    whole, halves = RuleEngine(RuleBook([rule]), on_error="raise"), RuleEngine(RuleBook([rule]), on_error="raise")
    half = len(records) // 2
    for record in records:
        whole.judge(record)
    for record in records[:half]:
        halves.judge(record)
    resumed = RuleEngine(RuleBook([rule]), on_error="raise")
    try:
        resumed.load_state_dict(copy.deepcopy(halves.state_dict()))
    except GradwatchError as error:
        raise AssertionError(f"{rule.name}: its memory loads from a checkpoint. It raised {error}") from error
    for record in records[half:]:
        resumed.judge(record)
    same = [str(i) for i in resumed.incidents] == [str(i) for i in whole.incidents]
    _law(same, f"{rule.name}: judging goes on after a checkpoint as without one")


def _as_tuple(finding: Finding) -> tuple[Any, ...]:
    return finding.rule, finding.step, finding.path, finding.value, finding.limit, finding.severity


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.ndarray, np.generic))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(f"broken law: {text}.")
