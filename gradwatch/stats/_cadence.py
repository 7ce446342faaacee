"""At which steps something is measured that is not measured at every one."""

from __future__ import annotations

__all__ = ["is_due", "next_due"]


def is_due(step: int, every: int | None) -> bool:
    """Return whether something with this cadence is measured at this step.

    Beside the multiples of `every`, the powers of two below it: most faults show in the first steps, and a
    short run would otherwise be judged on one sample.

    Args:
        step: optimizer steps taken so far.
        every: steps between two times; 0: at the first step alone; None: never.
    """
    if every is None:
        return False
    if not every:
        return step == 0
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def next_due(step: int, every: int) -> int:
    """Return the first step after this one at which something may be measured that is at one in `every`."""
    return min((step // every + 1) * every, 1 << step.bit_length())
