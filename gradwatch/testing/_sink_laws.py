"""Laws that every sink keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..protocols import RunMeta, Sink, as_sink
from ..records import Incident, StepRecord
from ._rule_laws import odd_records

__all__ = ["check_sink"]


def check_sink(make: Callable[[], Sink], *, run_dir: str | Path | None = None) -> None:
    """Raise where a sink breaks a law that gradwatch relies on.

    * it takes whatever a record may hold: missing columns, no loss, nan, infinities, a record that nothing measured;
    * it leaves records as they are;
    * `flush` may be called at any time, `close` twice, and a sink that was opened need not be written to;
    * it can be opened again after it was closed, to go on.

    Args:
        make: makes a new sink; called twice.
        run_dir: told to the sink as the folder of the run.

    Raises:
        AssertionError: which law, and what was seen; errors of the sink itself come through as they are.
    """
    sink = _made(make)
    name = type(sink).__name__
    meta = RunMeta(name="laws", run_dir=None if run_dir is None else str(run_dir), model="Sequential")
    sink.open(meta)
    records = odd_records(30)
    sink.flush()
    for i, record in enumerate(records[:20]):
        _write(sink, record, records[max(0, i - 3) : i + 1], name)
    sink.incident(_incident(resolved=False))
    sink.incident(_incident(resolved=True))
    sink.flush()
    sink.close()
    sink.close()
    sink.open(RunMeta(name="laws", run_dir=meta.run_dir, model="Sequential", start_step=20))
    _write(sink, records[20], records[20:21], name)
    sink.close()
    empty = _made(make)
    empty.open(RunMeta(name="laws-empty", run_dir=None if run_dir is None else str(Path(run_dir) / "empty")))
    empty.close()


def _made(make: Callable[[], Sink]) -> Sink:
    try:
        return as_sink(make())
    except ConfigError as error:
        raise AssertionError(f"broken law: {error}") from None


def _write(sink: Sink, record: StepRecord, window: list[StepRecord], name: str) -> None:
    before = {key: column.copy() for key, column in record.columns.items()}
    sink.write(record, window)
    for key, column in record.columns.items():
        if not np.array_equal(column, before[key], equal_nan=True):
            raise AssertionError(f"broken law: {name}: write() leaves records as they are. It changed {key!r}.")


def _incident(*, resolved: bool) -> Incident:
    return Incident(
        rule="exploding",
        first_step=10,
        last_step=12,
        paths=("2.weight", "0.weight"),
        first_path="2.weight",
        value=float("inf"),
        limit=3.0,
        message="gradient norm inf",
        advice="lower the learning rate",
        resolved=resolved,
        resolved_step=18 if resolved else None,
    )
