"""Run folders: of a run that came to its end, resumed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradwatch.protocols import RunMeta
from gradwatch.records import Histogram, Incident, TreatmentReport
from gradwatch.report import ReportData
from gradwatch.runs import compare, read_run, replay
from gradwatch.sinks import RunFolder

from ...sinks.made import mixed_index, record
from ..damage import damage_bytes, damage_json
from ..kind import Kind, Reading

INDEX = mixed_index(5, 2)


class RunFolders(Kind):
    name = "run-folders"
    share = 3.0
    count = 0

    def make(self, folder: Path) -> None:
        for start in (0, 24):
            sink = RunFolder(folder / "run", flush_records=8)
            sink.open(RunMeta(model="Net", start_step=start))
            for step in range(start, start + 32):
                sink.write(_record(step))
                if step % 8 == 7:
                    sink.flush()
                if step % 10 == 3:
                    sink.incident(_incident(step, is_over=False))
                if step % 10 == 5:
                    sink.incident(_incident(step - 2, is_over=True))
            sink.annotate(text="a note", silence=3, paths="*", rules="*")
            sink.summary("all is well")
            sink.close()

    def damage(self, folder: Path, rng: np.random.Generator) -> str:
        files = list(self.files(folder))
        file = files[int(rng.integers(len(files)))]
        draw, name = rng.random(), file.name
        if draw < 0.05:
            file.unlink()
            return f"{name} is gone"
        if draw < 0.08:
            file.unlink()
            file.symlink_to("/etc/hostname")
            return f"{name} points elsewhere"
        if draw < 0.4 and file.suffix in (".json", ".jsonl"):
            return f"{name}: {damage_json(file, rng)}"
        return f"{name}: {damage_bytes(file, rng)}"

    def read(self, folder: Path) -> Reading:
        run = read_run(folder / "run")
        found = {("record", r.step, round(r.loss, 12)) for r in run.records()}
        found |= {("incident", i.first_step, i.resolved) for i in run.incidents}
        found |= {("annotation", a["after_step"]) for a in run.annotations}
        found |= {("summary",)} if run.summary else set()
        self.count += 1
        look_everywhere(run, deep=self.count % 4 == 0)
        return Reading(found)


def look_everywhere(run, *, deep: bool) -> None:
    """Read all that there is to be read of a run, whatever comes of it; `deep`: as replay, comparison and report do."""
    for column in run.columns:
        run.matrix(column)
        run.measured(column)
    for name in run.scalars:
        run.scalar(name)
    for path in run.index.paths[:3]:
        run.histograms(path)
    str(run.health)
    if not deep:
        return
    replay(run, "default")
    compare(run, run)
    ReportData.from_run(run)


def _record(step: int):
    more = {}
    if step % 9 == 0:
        more["histograms"] = {INDEX.paths[0]: Histogram(np.arange(512))}
    if step % 7 == 0:
        more["treatments"] = (TreatmentReport(name="clip", rule="exploding", before=2.0, after=1.0, values={"c": 0.5}),)
    if step % 11 == 0:
        more["unseen"] = {INDEX.paths[1]: "moved"}
    return record(step, INDEX, norm=1.0 + step % 5, scalars={"limit": 3.0}, **more)


def _incident(step: int, *, is_over: bool) -> Incident:
    more = {"resolved": True, "resolved_step": step + 2} if is_over else {}
    return Incident(rule="exploding", first_step=step, last_step=step, id=step, paths=(INDEX.paths[0],), **more)
