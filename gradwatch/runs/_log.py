"""Logs of other programs: TensorBoard event files and CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import RunFormatError, UnknownNameError, suggest
from ..records import Index, StepRecord
from ..sinks.blocks import Block, encode
from ._events import event_run, read_events
from ._live import Live
from ._recorded import Recorded
from ._tags import Roles, assign

__all__ = ["Log", "read_log"]

Series = dict[str, dict[int, float]]
"""Tag -> step -> value."""

ALL = "all parameters"
"""The one path of a log that knows nothing of layers."""


class Log(Recorded):
    """A log that gradwatch did not write, as records: it can be looked at, and judged by `replay`, as a run can.

    Attributes:
        path: of the file or folder.
        meta: `format`, `name`, and `roles`: which tag was taken for what.
    """

    def __init__(self, path: Path, records: Sequence[StepRecord], meta: Mapping[str, object]) -> None:
        self.path = path
        self.meta = dict(meta)
        self._record_index = records[0].index
        block = encode(records)
        self._blocks = [Live(block, np.ones(len(block), np.bool_))]

    def __repr__(self) -> str:
        return f"Log({str(self.path)!r}, {len(self)} records)"

    @property
    def _ending(self) -> tuple[str, str]:
        return "unknown", "another program wrote this log, which does not say how the run ended"

    @property
    def complete(self) -> bool:
        # Nobody knows; a rule that judges a whole run would judge half of one.
        return False

    def _live_blocks(self) -> Sequence[Live]:
        return self._blocks

    def _index_of(self, block: Block) -> Index:
        return self._record_index


def read_log(
    path: str | os.PathLike[str],
    *,
    scalars: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Log:
    """Read the scalars of a TensorBoard directory or event file, or of a CSV file, as records.

    What a tag means is told from its name, the last parts first: `loss`, `train/loss`, `train_loss_step`, ... are the
    loss; `grad_norm`, `train/grad_norm`, `total_norm`, `grad_2.0_norm_total`, ... the global norm; `lr`,
    `learning_rate`, `lr-Adam`, ... the learning rate; `val_loss`, `eval/loss`, ... the validation loss;
    `grad_2.0_norm/<path>`, `grad_norm/<path>`, `gradients/<path>` the gradient norm of a parameter. All other tags
    become scalars under their own names. There is a record for every step at which a loss or a norm was logged; what
    was logged in between joins the next one.

    Args:
        path: of the log.
        scalars: what was meant where the names don't tell: `{"loss": "my/tag"}`; for `loss`, `lr`, `global_norm`,
            `global_norm_after`, `epoch`, `step` (CSV), or any name in `record.scalars`.
        columns: patterns with one `*` for the parameter's path: `{"grad_norm": "norms/*"}`.

    Raises:
        RunFormatError: it can't be read, or holds neither a loss nor a norm.
        UnknownNameError: a tag in `scalars` is not in the log.
    """
    file, given = Path(path), dict(scalars or {})
    if not file.exists():
        raise RunFormatError(f"{file} does not exist.")
    if file.is_file() and file.suffix.lower() in (".csv", ".tsv", ".txt"):
        counter = given.pop("step", None)
        form, series = "csv", _read_csv(file, counter)
    else:
        file = event_run(file)
        form, series = "tensorboard", read_events(file)
    roles = assign(list(series), given, dict(columns or {}), where=str(file))
    records = _records(series, roles)
    if not records:
        tags = ", ".join(sorted(series)[:10]) or "none"
        hint = suggest("loss", series, otherwise="")
        raise RunFormatError(
            f"{file} has neither a loss nor a gradient norm that could be told by its name. {hint} Say which it is: "
            f"scalars={{'loss': TAG}}. Its tags: {tags}."
        )
    return Log(file, records, {"format": form, "name": file.name, "roles": roles.named})


def _read_csv(file: Path, step: str | None) -> Series:
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        sample = stream.read(4096)
        stream.seek(0)
        delimiter = max(",;\t", key=sample.split("\n", 1)[0].count)
        rows = csv.DictReader(stream, delimiter=delimiter)
        names = [n for n in rows.fieldnames or [] if n]
        lower = {n.lower().strip(): n for n in reversed(names)}
        counters = ("step", "global_step", "trainer/global_step", "train/global_step", "iteration", "iter", "_step")
        if step is not None and step not in names:
            raise UnknownNameError("column", step, names, where=str(file))
        counter = step or next((lower[c] for c in counters if c in lower), None)
        series: Series = {n: {} for n in names if n != counter}
        for number, row in enumerate(rows):
            place = _number(row.get(counter)) if counter else float(number)
            if place is None or not np.isfinite(place):
                continue
            for name in series:
                if (value := _number(row.get(name))) is not None:
                    series[name][int(place)] = value
    return {name: values for name, values in series.items() if values}


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def _records(series: Series, roles: Roles) -> list[StepRecord]:
    """Return a record for every step at which a loss or a norm was logged."""
    columns = {
        column: {path: series[tag] for path, tag in tags.items()} for column, tags in roles.columns.items() if tags
    }
    paths = list(dict.fromkeys(p for tags in roles.columns.values() for p in tags))
    norm = series.get(roles.named.get("global_norm", ""), {})
    if not paths and norm:
        # A norm that is nan shows in the column; a global norm that is nan was not measured.
        paths, columns = [ALL], {"grad_norm": {ALL: norm}}
    spine = sorted(
        {s for role in ("loss", "global_norm") for s in series.get(roles.named.get(role, ""), {})}
        | {s for tags in columns.values() for values in tags.values() for s in values}
    )
    index = Index.of_parameters(paths)
    places = np.array(spine)
    filled = {name: _joined(series[tag], places) for name, tag in roles.named.items()}
    others = {name: _joined(series[tag], places) for name, tag in roles.others.items()}
    return [_record(step, index, filled, others, columns) for step in spine]


def _joined(values: Mapping[int, float], spine: np.ndarray) -> dict[int, float]:
    """Return the values at the steps of the spine; one in between joins the next, and the newest counts."""
    joined = {}
    for step, value in sorted(values.items()):
        place = int(np.searchsorted(spine, step))
        if place < len(spine):
            joined[int(spine[place])] = value
    return joined


def _record(
    step: int,
    index: Index,
    named: Mapping[str, Mapping[int, float]],
    others: Mapping[str, Mapping[int, float]],
    columns: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> StepRecord:
    at = {name: values[step] for name, values in named.items() if step in values}
    taken, masks = {}, {}
    for column, tags in columns.items():
        known = [tags.get(p, {}).get(step) for p in index.paths]
        if any(v is not None for v in known):
            taken[column] = np.array([0.0 if v is None else v for v in known])
            masks[column] = np.array([v is not None for v in known])
    norm = at.get("global_norm", float("nan"))
    plain = ("loss", "lr", "global_norm", "global_norm_after", "epoch")
    return StepRecord(
        step=step,
        index=index,
        epoch=int(at["epoch"]) if np.isfinite(at.get("epoch", np.nan)) else -1,
        loss=at.get("loss", float("nan")),
        has_loss="loss" in at,
        lr=at.get("lr", float("nan")),
        global_norm=norm,
        has_gradient="global_norm" in at or "grad_norm" in taken,
        global_norm_after=at.get("global_norm_after", norm),
        columns=taken,
        masks=masks,
        scalars={k: v for k, v in at.items() if k not in plain}
        | {name: values[step] for name, values in others.items() if step in values},
    )
