from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.protocols import RunMeta
from gradwatch.records import Incident, Index, RuleCoverage, StepRecord, judge_run
from gradwatch.sinks import RunFolder

PATHS = ("encoder.weight", "encoder.bias", "decoder.weight")


def write_run(folder: Path, *, incidents: tuple[Incident, ...] = (), steps: int = 60, spike: int | None = None) -> Path:
    """Write a run of a model with three parameters, as the engine does; the norm is a thousandfold at `spike`."""
    index = Index(
        paths=PATHS,
        kinds=("parameter",) * 3,
        numel=np.array([12, 3, 6]),
        shapes=((4, 3), (3,), (3, 2)),
        depth=np.arange(3),
    )
    sink = RunFolder(folder)
    sink.open(RunMeta(name="gradwatch", started=100.0, model="Toy"))
    for step in range(steps):
        norms = np.array([1.0, 0.1, 2.0]) * (1000 if step == spike else 1)
        total = float(np.sqrt((norms**2).sum()))
        columns = {"grad_norm": norms, "update_ratio": np.full(3, 1e-3)}
        sink.write(
            StepRecord(
                step=step,
                index=index,
                time=100.0 + step,
                loss=2.0 - step / steps,
                lr=1e-3,
                global_norm=total,
                global_norm_after=total,
                columns=columns,
            )
        )
    for incident in incidents:
        sink.incident(incident)
    if steps:
        sink.summary("")
        sink.judged(judge_run(coverage=[RuleCoverage(name="exploding", judged=steps)], num_steps=steps), "complete")
    sink.close()
    return folder


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "healthy")


SPIKE = Incident(
    rule="exploding", first_step=30, last_step=30, severity="warning", paths=("decoder.weight", "encoder.weight"),
    first_path="decoder.weight", value=2236.0, limit=40.0, treatments=("clip_to_limit",), advice="Look at the batch.",
    message="gradient norm 2236", id=1,
)  # fmt: skip


@pytest.fixture
def spiked(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "spiked", incidents=(SPIKE,), spike=30)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: Any) -> None:
    """Tests read plain text, whatever terminal they are started from."""
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
