"""Records made from series, for tests of rules: no model, no trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradwatch.records import MODULE, PARAMETER, Incident, Index, StepRecord
from gradwatch.rules import RuleBook, RuleEngine

PARAMETERS = ("a.weight", "b.weight", "c.weight")
MODULES = ("a", "b", "c")


def make_index(
    parameters: Sequence[str] = PARAMETERS,
    modules: Sequence[str] = MODULES,
    *,
    types: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    depth: Mapping[str, int] | None = None,
    trainable: Iterable[bool] | None = None,
    in_optimizer: Iterable[bool] | None = None,
) -> Index:
    """A module and its own parameters share a depth, as in live records."""
    paths = (*parameters, *modules)
    owners = {p: p.rpartition(".")[0] for p in parameters} | {m: m for m in modules}
    order = {owner: i for i, owner in enumerate(dict.fromkeys(owners.values()))} | dict(depth or {})
    flags: dict[str, Any] = {}
    for name, given in (("trainable", trainable), ("in_optimizer", in_optimizer)):
        if given is not None:
            flags[name] = np.array([*given, *(False for _ in modules)])
    return Index(
        paths=paths,
        kinds=(PARAMETER,) * len(parameters) + (MODULE,) * len(modules),
        numel=np.array([100] * len(parameters) + [0] * len(modules)),
        shapes=tuple((shapes or {}).get(p, (10, 10)) for p in parameters) + ((),) * len(modules),
        depth=np.array([order[owners[p]] for p in paths]),
        types=tuple((types or {}).get(owners[p], "Linear") for p in paths),
        **flags,
    )


INDEX = make_index()


def make_record(step: int, index: Index = INDEX, **given: Any) -> StepRecord:
    """Return a record; columns are given by name as {path: value}, scalars by name, fields by name."""
    fields: dict[str, Any] = {"lr": 1e-3}
    columns, masks, scalars = {}, {}, {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            columns[name] = np.array([value.get(p, np.nan) for p in index.paths], np.float64)
            masks[name] = np.array([p in value for p in index.paths])
        elif name in StepRecord.__dataclass_fields__:
            fields[name] = value
        else:
            scalars[name] = float(value)
    if "grad_norm" in columns and "global_norm" not in fields:
        fields["global_norm"] = float(np.sqrt(np.square(columns["grad_norm"][masks["grad_norm"]]).sum()))
    fields.setdefault("has_loss", "loss" in given)
    return StepRecord(step=step, index=index, columns=columns, masks=masks, scalars=scalars, **fields)


def norms(*values: float) -> dict[str, float]:
    """Gradient norms of the parameters of `INDEX`, in order."""
    return dict(zip(PARAMETERS, values, strict=False))


def run(rules: Any, records: Iterable[StepRecord], *, finish: bool = False) -> list[Incident]:
    """Return the incidents that one or several rules make of records."""
    book = rules if isinstance(rules, RuleBook) else RuleBook(rules if isinstance(rules, (list, tuple)) else [rules])
    engine = RuleEngine(book, on_error="raise")
    last = -1
    for record in records:
        engine.judge(record)
        last = record.step
    if finish:
        engine.finish(last + 1)
    return engine.incidents


def fires(rules: Any, records: Iterable[StepRecord], *, finish: bool = False) -> bool:
    return bool(run(rules, records, finish=finish))
