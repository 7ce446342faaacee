"""A run as a notebook shows it: the verdict, loss and norms, the incidents, layer by layer a strip of colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .._markup import card, escape, number, table
from ..records import HEALTHY, Floats, Incident, Verdict, heading, incidents_html, rank_incidents
from ._curves import Curve, curves, lies_on
from ._series import Series
from ._strip import MISSING, gradient, limits, strip

__all__ = ["RunCard"]

MOST_LAYERS = 24
STRIP = 320
BLUE, GREEN, RED = "#3b82d6", "#1a9c6b", "#e12a49"


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What is shown of a run. `html()` draws it.

    Attributes:
        headline: one sentence.
        tone: how it is coloured: "good", "bad", "unseen".
        facts: sentences below it.
        series: what is drawn.
        incidents: of the run.
        verdict: with what each rule judged; None while that can't be said.
        notes: what was not seen.
    """

    headline: str
    tone: str
    facts: Sequence[str] = ()
    series: Series = field(default_factory=Series)
    incidents: Sequence[Incident] = ()
    verdict: Verdict | None = None
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        series: Series,
        incidents: Sequence[Incident],
        *,
        facts: Sequence[str] = (),
        notes: Iterable[str] = (),
    ) -> RunCard:
        """Return the card of a run with its verdict."""
        return cls(
            headline=verdict.headline,
            tone=verdict.tone,
            facts=facts,
            series=series,
            incidents=incidents,
            verdict=verdict,
            notes=tuple(notes),
        )

    def html(self) -> str:
        """Return the card as HTML that needs no script, no style sheet and no file."""
        ranked = rank_incidents(self.incidents)
        told = self.incidents or (self.verdict is not None and self.verdict.state == HEALTHY)
        return card(
            self.headline,
            self.tone,
            *(f"<div>{escape(fact)}</div>" for fact in self.facts),
            *self._curves(),
            incidents_html(ranked) if told else "",
            self._layers(),
            "" if self.verdict is None else self.verdict.judged_html(),
            "".join(f"<div>note: {escape(note)}</div>" for note in self.notes),
        )

    def _curves(self) -> list[str]:
        series = self.series
        if not len(series):
            return []
        produced, applied = series.curve("global_norm"), series.curve("global_norm_applied")
        norms = [
            Curve("as produced", produced, BLUE),
            Curve("as the optimizer got it", np.where(lies_on(applied, produced), MISSING, applied), GREEN),
            Curve("alarm's bar", series.curve("limit"), RED),
        ]
        norms = [norm for norm in norms if (norm.values != MISSING).any()]
        steps, last, incidents = series.steps, series.last_step, self.incidents
        losses = [Curve("loss", series.curve("loss"), BLUE)]
        return [
            curves("loss", steps, last, losses, incidents, is_log=_spans_decades(losses[0].values)),
            curves("global gradient norm", steps, last, norms, incidents, is_log=True) if norms else "",
        ]

    def _layers(self) -> str:
        series, norms = self.series, self.series.norms
        places = [i for i in self._chosen() if (norms[:, i] != MISSING).any()]
        if not places:
            return ""
        low, high = limits(norms[:, places])
        rows = [self._layer(series.layers[i], norms[:, i], low, high) for i in places]
        span = f"{heading('grad_norm')}, step {series.steps[0]:,.0f} to {series.last_step:,}"
        scale = f"{number(10**low)} {gradient(90)} {number(10**high)}; grey zero, red not finite"
        left = len(series.layers) - len(places)
        more = f"; {left} more layers in the report" if left > 0 else ""
        return table(("parameter", span, "last", "median", "largest"), rows) + f"<div>{scale}{more}</div>"

    def _layer(self, path: str, norms: Floats, low: float, high: float) -> tuple[str, ...]:
        values = norms[norms != MISSING]
        finite = values[np.isfinite(values)]
        median = float(np.median(finite)) if len(finite) else float("nan")
        said = f"gradient norm of {escape(path)} over the steps"
        shown = [f"<code>{escape(path)}</code>", strip(norms, low, high, width=STRIP, said=said)]
        return (*shown, *(escape(number(float(v))) for v in (values[-1], median, np.max(values))))

    def _chosen(self) -> list[int]:
        """Return the layers that incidents name, and others evenly, in forward order."""
        layers = self.series.layers
        named = {path for i in self.incidents for path in (i.first_path, i.worst_path, *i.paths[:4])}
        first = [i for i, path in enumerate(layers) if path in named][:MOST_LAYERS]
        rest = [i for i in range(len(layers)) if i not in set(first)]
        room = min(MOST_LAYERS - len(first), len(rest))
        spread = np.linspace(0, len(rest) - 1, room).astype(int).tolist() if room else []
        return sorted({*first, *(rest[i] for i in spread)})


def _spans_decades(values: Floats) -> bool:
    """Return whether a linear axis would show the largest alone: all above zero, over two decades or more."""
    seen = values[np.isfinite(values)]
    return bool(len(seen)) and float(seen.min()) > 0 and float(seen.max()) >= 100 * float(seen.min())
