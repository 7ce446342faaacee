"""What is known of one incident, gathered in one place: where it was, what was measured around it, what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from .._markup import Prints, card, escape, table
from .._text import replay_command
from ._causes import rank_incidents
from ._histogram import NUM_BINS, Histogram
from ._incident import Incident, _plain
from ._sample import Sample
from ._what_if import WhatIf

__all__ = ["CASE_SCHEMA", "CaseFile", "CaseHistogram", "CaseLayer", "CaseTreatment", "with_cases"]

CASE_SCHEMA = 1
"""Version of a case file; readers refuse a higher one."""

HALF = 0.5
"""A sample that carries so much of a gradient is looked at first."""
JUMP = 3.0
"""A number that is so many times what it was before is worth a word."""


class CaseLayer(NamedTuple):
    """A parameter's gradient norm at the step, and its median over the steps before; nan where there was none."""

    path: str
    before: float
    at: float

    @property
    def growth(self) -> float:
        """How many times its own level; nan where that is not known."""
        return self.at / self.before if self.before > 0 else float("nan")


class CaseHistogram(NamedTuple):
    """A gradient's histogram: `when` is "before", "at" or "after"."""

    when: str
    step: int
    path: str
    histogram: Histogram


class CaseTreatment(NamedTuple):
    """What one treatment did at a step: the global norm before it and after it (nan: the step was vetoed)."""

    step: int
    name: str
    rule: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseFile(Prints):
    """What is known of one incident.

    Attributes:
        rule, name, id, step: of the incident, and its first step: what tells incidents apart.
        value, bar, worst_path, worst_step: what the rule saw at its worst, what it held it against, where ("": in the
            whole model) and when (-1: not known). A limit is another thing: what a treatment clips to.
        epoch, batch_idx: as the trainer counts; -1 where it does not.
        num_samples: in the step's batches; 0 where unknown.
        rank, num_ranks: whose batch it was.
        samples: those that carry most of the gradient, largest share first, with `autopsy=True`.
        sample_ids: indices in the data set, or ids, of the samples of the step's batches; empty where nobody tells.
        num_micro_batches: how many the step had, where `samples` are known.
        samples_from: who told `sample_ids`, in words.
        batch_file: of the saved batch, beside the case file; "" where none was saved.
        steps: of the curves: some before the incident, and some after.
        curves: name -> one number for each of `steps`, nan where there is none: `loss`, `lr`, `global_norm` (as
            produced), `global_norm_after` (gradwatch's treatments), `global_norm_applied` (as the optimizer got it),
            `accepted` (the largest global norm that all rules take as usual) and `limit` (what a treatment clips to).
        layers: parameters whose gradients were furthest above their own level, those first.
        histograms: of gradients that the incident is of: the last before it, at its step, the first after it.
        born_in, phase: what the autopsy found: the module where the first bad value was made, in "forward" or
            "backward"; "" where there was none.
        modules: the autopsy's table, in forward order.
        treatments: what was done in the steps of `steps`.
        consequences: incidents that follow from this one, as sentences.
        flight_recorder: file of the flight recorder, where one was written.
        what_if: which change of the training cures it, with `what_if=True`; None where that was not tried.
        notes: what is not here, and why.
        complete: what came after is here, too.
        folder: of the run, where it lies now; "" where it has none. No part of `to_json`.
    """

    rule: str
    step: int
    name: str = ""
    id: int = 0
    value: float = float("nan")
    bar: float = float("nan")
    worst_path: str = ""
    worst_step: int = -1
    epoch: int = -1
    batch_idx: int = -1
    num_samples: int = 0
    rank: int = 0
    num_ranks: int = 1
    samples: tuple[Sample, ...] = ()
    sample_ids: tuple[int | str, ...] = ()
    num_micro_batches: int = 1
    samples_from: str = ""
    batch_file: str = ""
    steps: tuple[int, ...] = ()
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[CaseLayer, ...] = ()
    histograms: tuple[CaseHistogram, ...] = ()
    born_in: str = ""
    phase: str = ""
    modules: tuple[Mapping[str, Any], ...] = ()
    treatments: tuple[CaseTreatment, ...] = ()
    consequences: tuple[str, ...] = ()
    flight_recorder: str = ""
    what_if: WhatIf | None = None
    notes: tuple[str, ...] = ()
    complete: bool = False
    folder: str = ""

    def is_of(self, incident: Incident) -> bool:
        """Return whether it is this incident's."""
        theirs = incident.id, incident.name or incident.rule, incident.first_step
        return (self.id, self.name or self.rule, self.step) == theirs

    def at(self, curve: str, offset: int = 0) -> float:
        """Return a curve's number at the incident's step, or so many recorded steps later; nan where there is none."""
        values = self.curves.get(curve, ())
        place = next((i for i, step in enumerate(self.steps) if step >= self.step), None)
        if place is None or not 0 <= place + offset < len(values):
            return float("nan")
        return values[place + offset]

    def before(self, curve: str) -> float:
        """Return the median of a curve's finite numbers before the incident; nan where there is none."""
        known = zip(self.steps, self.curves.get(curve, ()), strict=False)
        values = [value for step, value in known if step < self.step and np.isfinite(value)]
        return float(np.median(values)) if values else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return plain values; non-finite floats as "nan", "inf" and "-inf", histograms by their filled bins alone."""
        apart = ("histograms", "samples", "what_if", "folder")
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in apart}
        plain["samples"] = [sample.to_json() for sample in self.samples]
        plain["what_if"] = None if self.what_if is None else self.what_if.to_dict()
        return {"schema": CASE_SCHEMA, **plain, "histograms": [_packed(entry) for entry in self.histograms]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaseFile:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__ and k != "folder"}
        known["curves"] = {str(k): tuple(map(float, v)) for k, v in data.get("curves", {}).items()}
        known["layers"] = tuple(CaseLayer(str(p), float(b), float(a)) for p, b, a in data.get("layers", ()))
        known["histograms"] = tuple(map(_unpacked, data.get("histograms", ())))
        known["treatments"] = tuple(
            CaseTreatment(int(s), str(n), str(r), float(b), float(a)) for s, n, r, b, a in data.get("treatments", ())
        )
        for name in ("sample_ids", "consequences", "notes"):
            known[name] = tuple(known.get(name, ()))
        known["samples"] = tuple(map(Sample.from_json, data.get("samples", ())))
        known["what_if"] = None if data.get("what_if") is None else WhatIf.from_dict(data["what_if"])
        known["steps"] = tuple(map(int, data.get("steps", ())))
        known["modules"] = tuple(dict(row) for row in data.get("modules", ()))
        for name in ("value", "bar"):
            known[name] = float(known.get(name, "nan"))
        for name in _COUNTS & known.keys():
            known[name] = int(known[name])
        return cls(**known)

    def lines(self) -> list[tuple[str, str]]:
        """Return what there is to say, as pairs of a heading and a sentence, in the order in which one would look."""
        found = [
            ("where", self._where()),
            ("what if", "" if self.what_if is None else self.what_if.sentence()),
            ("loss", self._around("loss")),
            ("global norm", self._around("global_norm") + self._usual()),
            ("bar", self._bar()),
            ("limit", self._limit()),
            ("layers", "; ".join(map(_layer, self._standing_out()[:3]))),
            ("born in", f"{self.born_in} ({self.phase})" if self.born_in else ""),
            ("carried by", "; ".join(map(str, self.samples[:2]))),
            ("done", self._done()),
            ("follows", "; ".join(self.consequences[:4]) + _more(len(self.consequences) - 4)),
            ("look first at", "; ".join(self.check_first())),
            ("kept", ", ".join(filter(None, (self.batch_file, self.flight_recorder)))),
            ("not here", "; ".join(self.notes)),
        ]
        return [(head, text) for head, text in found if text]

    def check_first(self) -> list[str]:
        """Return what the evidence points at, the most telling first."""
        found = []
        if self.born_in:
            found.append(f"the {self.phase} of {self.born_in}")
        first = next(iter(self.samples), None)
        if first is not None and (not first.is_finite or first.share >= HALF):
            found.append(str(first))
        rate, usual = self.at("lr"), self.before("lr")
        if usual > 0 and rate / usual >= JUMP:
            found.append(f"the learning rate, which went from {usual:.3g} to {rate:.3g}")
        loss, level = self.at("loss"), self.before("loss")
        if not np.isnan(level) and not np.isfinite(loss) and self._has("loss"):
            found.append("the loss, which is not finite itself")
        elif level > 0 and loss / level >= JUMP:
            found.append(f"the batch: its loss is {loss / level:.3g} times the level before")
        elif self.sample_ids or self.batch_idx >= 0:
            found.append(f"the batch ({self.batch})")
        alone = [layer for layer in self.layers if layer.growth >= JUMP]
        if alone and len(alone) <= 2 < len(self.layers):
            found.append(f"{' and '.join(layer.path for layer in alone)}: the others kept their level")
        return found

    @property
    def batch(self) -> str:
        """Which batch it was, in words; "" where nobody counts."""
        parts = [f"batch {self.batch_idx:,}"] if self.batch_idx >= 0 else []
        parts += [f"{'of' if parts else 'a batch of'} epoch {self.epoch:,}"] if self.epoch >= 0 else []
        parts += [f"of rank {self.rank} of {self.num_ranks}"] if self.num_ranks > 1 else []
        return " ".join(parts)

    def _has(self, curve: str) -> bool:
        return any(step == self.step for step in self.steps) and curve in self.curves

    def _where(self) -> str:
        samples = ""
        if self.sample_ids:
            some = ", ".join(map(str, self.sample_ids[:8])) + _more(len(self.sample_ids) - 8)
            samples = f"samples {some} ({self.samples_from})"
        elif self.num_samples:
            samples = f"{self.num_samples:,} samples"
        return ", ".join(filter(None, (f"step {self.step:,}", self.batch, samples)))

    def _around(self, curve: str) -> str:
        at, before, after = self.at(curve), self.before(curve), self.at(curve, 1)
        if np.isnan(at) and np.isnan(before):
            return ""
        words = [f"{before:.3g} before"] if not np.isnan(before) else []
        words.append(f"{at:.3g} at the step")
        return ", ".join([*words, f"{after:.3g} at the next"] if not np.isnan(after) else words)

    def _bar(self) -> str:
        if np.isnan(self.bar):
            return ""
        when = f" at step {self.worst_step:,}" if self.worst_step not in (-1, self.step) else ""
        where = self.worst_path or "the whole model"
        return f"{self.value:.3g} in {where}{when}, against the rule's bar of {self.bar:.3g}"

    def _usual(self) -> str:
        accepted = self.at("accepted")
        return f"; up to {accepted:.3g} would have passed as usual" if np.isfinite(accepted) else ""

    def _standing_out(self) -> list[CaseLayer]:
        """The one that the rule's number is of, and those far above their own level."""
        return [layer for layer in self.layers if layer.path == self.worst_path or not layer.growth < JUMP]

    def _limit(self) -> str:
        limit = self.at("limit")
        return f"gradients are clipped to {limit:.3g}" if np.isfinite(limit) else ""

    def _done(self) -> str:
        now = [t for t in self.treatments if t.step >= self.step]
        words = []
        for treatment in now[:3]:
            change = f"{treatment.before:.3g} to {treatment.after:.3g}"
            what = "the step was vetoed" if np.isnan(treatment.after) else f"global norm {change}"
            words.append(f"{treatment.name} at step {treatment.step:,}: {what}")
        return "; ".join(words) + _more(len(now) - 3)

    def with_command(self) -> list[tuple[str, str]]:
        """Return the lines, and what tells what other rules would have said, where the run has a folder."""
        return [*self.lines(), *([("replay", replay_command(self.folder))] if self.folder else [])]

    def _repr_html_(self) -> str:
        rows = [(f"<b>{escape(head)}</b>", escape(text)) for head, text in self.with_command()]
        return card(f"case of {self.name or self.rule}, step {self.step:,}", "info", table(("", ""), rows))

    def __str__(self) -> str:
        head = f"case of {self.name or self.rule}, step {self.step:,}"
        return "\n".join([head, *(f"  {head:<14} {text}" for head, text in self.with_command())])


_COUNTS = {"step", "id", "worst_step", "epoch", "batch_idx", "num_samples", "num_micro_batches", "rank", "num_ranks"}


def with_cases(incidents: Sequence[Incident], cases: Sequence[CaseFile]) -> list[Incident]:
    """Return the incidents in their order, each with its case where there is one, which names what follows from it."""
    kept = {(case.id, case.name or case.rule, case.step): case for case in cases}
    if not kept:
        return list(incidents)
    followers: dict[int, list[str]] = {}
    for ranked in rank_incidents(incidents):
        if ranked.cause is not None:
            told = f"{ranked.incident.name or ranked.incident.rule} (step {ranked.incident.first_step:,})"
            followers.setdefault(id(ranked.cause), []).append(told)
    found = []
    for incident in incidents:
        case = kept.get((incident.id, incident.name or incident.rule, incident.first_step))
        if case is not None:
            advice = _advice(incident, case)
            case = replace(case, consequences=tuple(followers.get(id(incident), ())))
            incident = replace(incident, case=case, advice=advice)
        found.append(incident)
    return found


def _advice(incident: Incident, case: CaseFile) -> str:
    """Return the advice of an incident: first what was measured to cure it, then what its rule would guess."""
    said = case.what_if.sentence() if case.what_if is not None and case.what_if.winner is not None else ""
    said = said[:1].upper() + said[1:]
    return incident.advice if not said or said in incident.advice else f"{said} {incident.advice}".rstrip()


def _layer(layer: CaseLayer) -> str:
    return f"{layer.path} {layer.at:.3g}" + (f" (before {layer.before:.3g})" if np.isfinite(layer.before) else "")


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""


def _packed(entry: CaseHistogram) -> list[Any]:
    counts = entry.histogram.counts
    filled = np.flatnonzero(counts)
    return [entry.when, entry.step, entry.path, filled.tolist(), counts[filled].tolist()]


def _unpacked(entry: Sequence[Any]) -> CaseHistogram:
    when, step, path, bins, numbers = entry
    counts = np.zeros(NUM_BINS, np.int64)
    counts[np.asarray(bins, np.int64)] = np.asarray(numbers, np.int64)
    return CaseHistogram(str(when), int(step), str(path), Histogram(counts))
