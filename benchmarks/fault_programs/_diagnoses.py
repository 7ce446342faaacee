"""Which rules name which fault: fixed, so that a detection can be told from a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["DIAGNOSES", "is_diagnosed"]

_TOO_FAR = {"blown_up", "diverging", "exploding", "gradient_growth", "loss_spike", "non_finite", "update_too_large"}
_FADED = {"vanishing", "dead", "dead_units", "saturated", "update_too_small"}
_MISREAD = {"output_range", "target_semantics", "mistaken_loss"}

DIAGNOSES: dict[str, frozenset[str]] = {
    fault: frozenset(rules)
    for fault, rules in {
        # What the network does with signals.
        "vanishing": _FADED | {"act_scale", "constant_output"},
        "exploding": _TOO_FAR | {"act_scale"},
        "dead": {"dead", "dead_units", "vanishing", "constant_output"},
        "hidden_activation": {"vanishing", "saturated", "constant_output", "symmetric_units"},
        "initialisation": {"bad_initial_loss", "act_scale", "vanishing", "dead_units", "saturated", "exploding"},
        "symmetry": {"symmetric_units"},
        # What the optimizer does.
        "learning_rate_high": _TOO_FAR | {"dead_units", "saturated"},
        "learning_rate_low": {"crawling", "update_too_small", "undertrained", "not_learning"},
        "oscillation": _TOO_FAR,
        "regularisation": {"update_too_large", "bad_initial_loss", "constant_output"},
        "epsilon": _TOO_FAR,
        # What the loss makes of outputs and targets.
        "output_activation": _MISREAD | {"constant_output", "dead", "dead_units", "saturated"},
        "softmax_on_one_unit": {"constant_output", "output_range", "target_semantics"},
        "wrong_loss": _MISREAD | {"bad_initial_loss"},
        "loss_sign": {"diverging", "gradient_growth", "exploding", "non_finite", "val_not_learning", "overfit"},
        "loss_reduction": _TOO_FAR,
        "log_of_zero": {"non_finite"},
        "shape_broadcast": {"mistaken_loss", "target_semantics"},
        # What the data are.
        "unnormalised_input": {"unnormalised_input"},
        "tiny_input": {"unnormalised_input", "act_scale", "update_too_small"},
        "unscaled_targets": {"unnormalised_input", "output_range", "bad_initial_loss", "target_semantics"},
        "labels": {"constant_labels", "overfit", "val_not_learning", "not_learning"},
        # What the loop forgets.
        "gradients_kept": {"grad_not_reset"},
        "frozen": {"not_updating", "dead"},
        "stale_optimizer": {"not_updating"},
        "detached": {"not_updating", "dead"},
    }.items()
}
"""Fault -> rules that count as its diagnosis."""


def is_diagnosed(faults: Iterable[str], rules: Iterable[str]) -> bool:
    """Return whether any of the rules names any of the faults."""
    named = frozenset[str]().union(*(DIAGNOSES[fault] for fault in faults))
    return bool(named & set(rules))
