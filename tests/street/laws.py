"""What must hold of a watched run beside its bare one; each law says in a line how it is broken, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["LAWS"]

Outcome = dict[str, Any]


def ends_the_same(bare: Outcome, watched: Outcome) -> str:
    """Weights, buffers, gradients, optimizer state, random state and losses. Not judged where a treatment acted."""
    if watched["acted"]:
        return ""
    other = [name for name, digest in bare["digests"].items() if watched["digests"][name] != digest]
    return f"other {', '.join(other)}" if other else ""


def saves_the_same(bare: Outcome, watched: Outcome) -> str:
    """As many tensors for backward, in the same order."""
    one, other = bare["saved"], watched["saved"]
    return "" if one == other else f"{other['count']} tensors saved for backward, {one['count']} bare"


def keeps_nothing(bare: Outcome, watched: Outcome) -> str:
    """As many tensors, bytes and graphs alive at the end.

    A traced program has stand-ins of its own for each shape and set of hooks that it was traced under, without memory.
    """
    names = [name for name in bare["alive"] if not (bare["traced"] and name == "tensors")]
    other = [name for name in names if watched["alive"][name] != bare["alive"][name]]
    return ", ".join(f"{watched['alive'][name]} {name}, {bare['alive'][name]} bare" for name in other)


def a_closed_watch_holds_numbers(bare: Outcome, watched: Outcome) -> str:
    """Kept for its incidents, a closed watch keeps some scalars, and neither a trainer nor copies of buffers."""
    more = watched["held"]["bytes"] - watched["alive"]["bytes"]
    return f"{more} bytes in tensors held by a closed watch" if more > 256 else ""


def leaves_no_hook(bare: Outcome, watched: Outcome) -> str:
    return "" if bare["hooks"] == watched["hooks"] else f"{watched['hooks']}, {bare['hooks']} bare"


def writes_nothing_on_objects(bare: Outcome, watched: Outcome) -> str:
    return "" if bare["marks"] == watched["marks"] else "other attributes or classes on modules, parameters, optimizers"


def warns_of_nothing(bare: Outcome, watched: Outcome) -> str:
    """Of none but what can't be read of the user's objects, where the program says that there is such a thing."""
    more = sorted(set(watched["warnings"]) - set(bare["warnings"]))
    return "; ".join(line for line in more if not (bare["told"] and bare["told"] in line))


def was_watched(bare: Outcome, watched: Outcome) -> str:
    """The run did as much, and there are records of it: a watch that saw nothing would keep every other law."""
    if bare["steps"] != watched["steps"]:
        return f"{watched['steps']} steps, {bare['steps']} bare"
    return "" if watched["measured"] else "no step was measured"


LAWS: dict[str, Callable[[Outcome, Outcome], str]] = {
    law.__name__: law
    for law in (
        ends_the_same,
        saves_the_same,
        keeps_nothing,
        a_closed_watch_holds_numbers,
        leaves_no_hook,
        writes_nothing_on_objects,
        warns_of_nothing,
        was_watched,
    )
}
