"""Which findings follow from which: the graph of causes by which every door puts a run's incidents into one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from .._text import printable
from ._incident import SEVERITIES, Incident
from ._shown import incidents_html

__all__ = ["LEADS_TO", "Incidents", "Ranked", "consequences", "rank_incidents"]

LAG = 256
"""Steps that a cause may be found after what follows from it: rules for causes wait until they are sure."""

TOGETHER = 20
"""Steps within which two causes were found together: which was first is chance."""

_RESULT = ("not_learning", "val_not_learning", "undertrained")
_UNSTABLE = ("exploding", "gradient_growth", "update_too_large", "loss_spike", "diverging", "non_finite")
_STILL = ("update_too_small", "crawling", *_RESULT)
_UNITS = ("dead_units", "saturated", "act_scale", "constant_output", "vanishing", "dead")

LEADS_TO: Mapping[str, tuple[str, ...]] = {
    # What goes in, and what it is compared with.
    "unnormalised_input": ("bad_initial_loss", "blown_up", *_UNSTABLE, *_UNITS),
    "target_scale": ("bad_initial_loss", "output_range", "blown_up", *_UNSTABLE, *_RESULT),
    "target_outliers": ("bad_initial_loss", "blown_up", *_UNSTABLE, *_RESULT),
    "constant_labels": ("constant_output", *_RESULT),
    "repeated_batch": ("overfit", *_RESULT),
    "repeated_order": ("overfit",),
    "same_batches_on_ranks": ("overfit",),
    "repeated_targets": _RESULT,
    "whole_targets": _RESULT,
    "targets_shifted": ("too_good", "overfit", *_RESULT),
    "too_good": ("overfit", *_RESULT),
    "leaked_targets": ("overfit", *_RESULT),
    "wrong_objective": ("output_range", "constant_output", *_RESULT),
    "sees_future": ("too_good", "overfit", *_RESULT),
    "target_semantics": ("constant_output", "loss_terms", *_RESULT),
    "mistaken_loss": ("output_range", "loss_terms", "bad_initial_loss", *_RESULT),
    "output_range": ("diverging", "constant_output", "loss_terms", "dead", *_RESULT),
    "loss_terms": ("constant_output", *_UNSTABLE, *_RESULT),
    # How the model was made and set.
    "symmetric_units": ("dead", *_RESULT),
    "bad_initial_loss": ("blown_up", *_UNSTABLE, "saturated", "act_scale", "loss_terms"),
    "not_updating": ("dead", "dead_signal", "cut_off", *_STILL),
    "cut_off": ("dead", *_RESULT),
    "grad_not_reset": ("gradient_growth", *_UNSTABLE),
    "eval_mode": ("batch_norm_statistics", "train_eval_mismatch", "overfit", *_UNSTABLE, *_RESULT),
    "batch_norm_statistics": ("train_eval_mismatch", "overfit", "val_not_learning"),
    "learning_rate_gone": _STILL,
    "epsilon_too_large": _STILL,
    "updates_rounded_away": _STILL,
    "weight_decay_too_large": ("update_too_large", *_UNITS, *_RESULT),
    "dropout_too_large": ("exploding", "val_not_learning", *_STILL),
    "weights_overwritten": ("restarted", *_UNSTABLE, *_STILL),
    "restarted": ("loss_spike", "diverging", *_RESULT),
    "amp_overflow": ("non_finite", *_RESULT),
    "rank_divergence": ("grad_conflict", *_UNSTABLE, *_RESULT),
    "recomputation_differs": ("rank_divergence", *_UNSTABLE, *_RESULT),
    "steps_too_long": ("loss_spike", "diverging", *_RESULT),
    "residual_growing": ("non_finite", "act_scale", "attention_logits_growing", "logits_drift", *_UNSTABLE, *_RESULT),
    # What becomes of it.
    "attention_logits_growing": ("attention_entropy_collapse", *_UNSTABLE, *_RESULT),
    "attention_entropy_collapse": ("vanishing", *_UNSTABLE, *_RESULT),
    "logits_drift": ("amp_overflow", *_UNSTABLE, *_RESULT),
    "blown_up": (*_UNSTABLE, *_UNITS, *_RESULT),
    "exploding": ("non_finite", "loss_spike", "diverging", "dead_units", "clip_too_often", *_RESULT),
    "gradient_growth": ("non_finite", "diverging", "clip_too_often"),
    "vanishing": ("act_scale", "constant_output", "update_too_small", "update_too_large", *_RESULT),
    "saturated": ("vanishing", "update_too_small", *_RESULT),
    "dead": ("act_scale", "update_too_large", "dead_signal", "constant_output", *_STILL),
    "dormant_units_growing": ("dead_units", "dead", *_RESULT),
    "dead_units": ("dead", "update_too_small", "constant_output", *_RESULT),
    "idle_experts": _RESULT,
    "no_contest": ("constant_output", "vanishing", *_STILL),
    "one_sided": (*_UNITS, *_UNSTABLE, *_STILL),
    "update_too_large": ("diverging", "loss_spike", *_RESULT),
    "update_too_small": ("crawling", *_RESULT),
    "dead_signal": _RESULT,
    "non_finite": ("dead_signal", "constant_output", *_RESULT),
    "constant_output": _RESULT,
    "diverging": ("act_scale", *_RESULT),
    "val_not_learning": ("overfit",),
    "train_eval_mismatch": ("val_not_learning", "overfit"),
}
"""Rule -> rules whose findings usually follow from its own."""


class Ranked(NamedTuple):
    """An incident in its place.

    Attributes:
        incident: as it stands.
        cause: the one that it follows from; None for one that leads.
    """

    incident: Incident
    cause: Incident | None


@cache
def consequences(rule: str) -> frozenset[str]:
    """Return all that may follow from a rule's finding, at first or second hand."""
    found: set[str] = set()
    todo = [rule]
    while todo:
        new = set(LEADS_TO.get(todo.pop(), ())) - found
        found |= new
        todo += new
    return frozenset(found)


class Incidents(list[Incident]):
    """Incidents in the order in which they began. A notebook shows each below what it follows from."""

    def __str__(self) -> str:
        ranked = rank_incidents(self)
        return (
            "\n".join(("" if cause is None else "  ") + str(incident) for incident, cause in ranked) or "no incidents"
        )

    def _repr_html_(self) -> str:
        return incidents_html(rank_incidents(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(printable(self))


def rank_incidents(incidents: Sequence[Incident]) -> list[Ranked]:
    """Return a run's incidents, each behind what it follows from: causes in the order in which they began (of those
    found together at the beginning the worst first), and what is only worth knowing at the end.

    One follows from another if that may cause it and was found before it, or at most `LAG` steps after; of several the
    one that none of the others causes, the earliest of these.
    """
    ordered = sorted(incidents, key=lambda i: (i.first_step, -_severity(i), i.id))
    causes = {id(i): _cause(i, ordered) for i in ordered}
    leads = sorted((i for i in ordered if causes[id(i)] is None), key=lambda i: _place(i, ordered))
    ranked = []
    for lead in leads:
        ranked.append(Ranked(lead, None))
        followers = [i for i in ordered if causes[id(i)] is lead]
        ranked += [Ranked(i, lead) for i in sorted(followers, key=lambda i: _remove(i, followers))]
    return ranked


def _place(incident: Incident, ordered: Sequence[Incident]) -> tuple[bool, int]:
    """Return where one stands among those that lead: notes last, and of what was found together the worst first."""
    together = incident.first_step <= ordered[0].first_step + TOGETHER
    return _is_note(incident), -_severity(incident) if together else 0


def _remove(incident: Incident, among: Sequence[Incident]) -> tuple[bool, int]:
    """Return where one stands among what follows from one cause: behind those that may cause it."""
    return _is_note(incident), sum(_may_cause(other, incident) for other in among)


def _cause(incident: Incident, ordered: Sequence[Incident]) -> Incident | None:
    found = [i for i in ordered if not _is_note(i) and _may_cause(i, incident)]
    roots = [i for i in found if not any(_may_cause(other, i) for other in found)]
    return roots[0] if roots else None


def _may_cause(cause: Incident, incident: Incident) -> bool:
    return incident.rule in consequences(cause.rule) and cause.first_step <= incident.first_step + LAG


def _is_note(incident: Incident) -> bool:
    return _severity(incident) == 0


def _severity(incident: Incident) -> int:
    return SEVERITIES.index(incident.severity) if incident.severity in SEVERITIES else 1
