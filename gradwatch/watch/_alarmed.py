"""Histograms of the very step at which an alarm was raised, for its case file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..records import Histogram, Incident
from ..stats import Gradients, exponent_histograms
from ..torchside import is_host
from ._ranks import are_several

__all__ = ["MAX_HISTOGRAMS", "Alarmed", "note_histograms", "paths_of"]

MAX_HISTOGRAMS = 4
"""Gradients of one incident whose histograms are kept."""

MAX_STEPS = 32
"""Alarms whose histograms are kept, the last ones."""

Alarmed: TypeAlias = dict[int, Mapping[str, Histogram]]
"""Step -> histograms of its gradients by path."""


def paths_of(incident: Incident) -> tuple[str, ...]:
    """Return the paths of an incident, the worst first, then the one where it began."""
    named = (incident.worst_path or "", incident.first_path, *incident.paths[:MAX_HISTOGRAMS])
    return tuple(dict.fromkeys(filter(None, named)))


def note_histograms(alarmed: Alarmed, incidents: Sequence[Incident], step: int, grads: Gradients) -> None:
    """Keep histograms of the gradients that incidents are of, as they lie there before any treatment.

    Not on a device whose numbers arrive late, on several ranks, and where gradients are still multiplied by a loss
    scale: there nothing may wait, and ranks measure together or not at all.
    """
    if not len(grads) or not is_host(grads.device) or are_several() or grads.grad_scale != 1.0:
        return
    places = {path: i for i, path in enumerate(grads.paths)}
    wanted = [places[path] for incident in incidents for path in paths_of(incident) if path in places]
    chosen = list(dict.fromkeys(wanted))[:MAX_HISTOGRAMS]
    if not chosen:
        return
    tensors = grads.tensors
    counts = exponent_histograms([tensors[i] for i in chosen]).numpy()
    paths = grads.paths
    alarmed[step] = {paths[i]: Histogram(row) for i, row in zip(chosen, counts, strict=True)}
    for old in sorted(alarmed)[:-MAX_STEPS]:
        del alarmed[old]
