"""What kinds of training there are, as far as rules ask: plain words, told once and read by all who judge or tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["TRAINING_KINDS", "kind_scalars", "kinds_in", "told_kinds"]

TRAINING_KINDS: Mapping[str, str] = {
    "supervised": "one model, one loss",
    "adversarial": "several optimizers, or several watched trainings, step in turns on losses of their own",
    "rl": "the loss compares values of chosen actions, whose level moves with the policy",
    "bootstrapped": "a network is copied from the one that is trained, not stepped, and gives its targets",
    "fine_tuning": "most of the weights are frozen",
    "mixture_of_experts": "like branches of which each sample takes some",
}
"""Name -> how it is told."""

_PREFIX = "kind/"


def kind_scalars(kinds: Iterable[str]) -> dict[str, float]:
    """Return the scalars that say on a record what kinds of training it is of."""
    return {_PREFIX + kind: 1.0 for kind in kinds if kind != "supervised"}


def kinds_in(scalars: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds that a record's scalars tell, in the order of `TRAINING_KINDS`."""
    found = {name[len(_PREFIX) :] for name in scalars if name.startswith(_PREFIX)}
    return tuple(kind for kind in TRAINING_KINDS if kind in found)


def told_kinds(kinds: Iterable[str]) -> str:
    """Return a line on the kinds of a training, for people; "" where it is a supervised one, or nothing is known."""
    said = [f"{kind.replace('_', ' ')} ({TRAINING_KINDS[kind]})" for kind in kinds if kind != "supervised"]
    return f"kind of training: {'; '.join(said)}" if said else ""
