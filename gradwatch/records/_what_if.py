"""What became of a training with one thing changed: each change that was tried, and the one that cures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite, isinf, nan
from typing import Any

from .._markup import Prints, card, escape, number, table, told
from ._incident import _plain

__all__ = ["CHANGE_KINDS", "Tried", "WhatIf", "gain_of"]

CHANGE_KINDS = ("repair", "part", "setting")
"""What a change changes, the most telling first: something that is out of what is usual is put right; a part of the
program is left out or replaced; a setting has another value."""

MARGIN = {"repair": 0.02, "part": 0.05, "setting": 0.12}
"""Share of what the training as it is leaves to learn that a change must take away to count as a cure. Little where
something unusual is put right; more for another value of what has many: with another learning rate healthy trainings,
too, learn faster for some steps."""
NEAR = 0.6
"""A more telling change comes before a less telling one that gains no more than 1 / `NEAR` times as much."""
LEAST = 0.05
"""What is left below this share is noise of the held batches."""
MAX_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Tried(Prints):
    """One change, and how the training went with it.

    Attributes:
        name: of the change; "" of the training as it is.
        kind: "repair", "part" or "setting" (see `CHANGE_KINDS`).
        cause: what is at fault if it cures.
        advice: what to do then.
        losses: of the steps, each by the loss function that was trained with.
        left: share of the targets' variation that the outputs on held batches leave unexplained after the steps, 0 to
            1; where that can't be told the loss on them; nan where they are not finite.
        is_finite: losses, gradients and outputs were finite, all of them.
        largest_norm: of a step's gradient.
        gain: share of what is left without the change that it takes away, at most 1; negative where it learns less.
        beside: another change that was made together with it, with which `gain` compares it; "" for none.
        seconds: that it took.
    """

    name: str = ""
    kind: str = "setting"
    cause: str = ""
    advice: str = ""
    losses: tuple[float, ...] = ()
    left: float = nan
    is_finite: bool = True
    largest_norm: float = nan
    gain: float = nan
    beside: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """Name, and what was changed beside it."""
        return f"{self.name} (beside {self.beside})" if self.beside else self.name

    @property
    def cures(self) -> bool:
        """Whether it learns clearly more than the training as it is."""
        return self.is_finite and self.gain >= MARGIN[self.kind]

    def __str__(self) -> str:
        ended = f"{number(self.left)} left" if self.is_finite else "not finite"
        return f"{self.name or 'as it is'}: {ended}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; floats that are not finite as "nan", "inf" and "-inf"."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tried:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known |= {name: float(known[name]) for name in ("left", "largest_norm", "gain", "seconds") if name in known}
        known["losses"] = tuple(map(float, known.get("losses", ())))
        if known.get("kind", "setting") not in CHANGE_KINDS:
            raise ValueError(f"a change of no known kind: {known['kind']!r}")
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class WhatIf(Prints):
    """Changes that were tried, the most telling first. Prints as a table.

    Attributes:
        control: the same steps with nothing changed.
        tried: the changes: first those that cure, the one named first being `winner`; then by what they leave.
        before: as `Tried.left`, before the first step.
        measure: what `left` is: "unexplained" or "loss".
        steps: of each.
        from_start: every one began with weights drawn anew, since from those that there were nothing learnt.
        not_tried: change -> why it was not tried.
        seconds: in all.
        why_not: why nothing was tried at all; "" where something was.
    """

    control: Tried = field(default_factory=Tried)
    tried: tuple[Tried, ...] = ()
    before: float = nan
    measure: str = "unexplained"
    steps: int = 0
    from_start: bool = False
    not_tried: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    why_not: str = ""

    @classmethod
    def ranked(cls, control: Tried, tried: Sequence[Tried], **more: Any) -> WhatIf:
        """Return it with the changes in the order in which they tell."""
        return cls(control=control, tried=tuple(_in_order(tried)), **more)

    @property
    def winner(self) -> Tried | None:
        """The change that cures; None where none does."""
        first = next(iter(self.tried), None)
        return first if first is not None and first.cures else None

    def sentence(self) -> str:
        """Return what came of it, in one sentence; "" where nothing did."""
        won = self.winner
        if self.why_not:
            return f"what would cure it is not seen: {self.why_not}"
        if won is None:
            return f"none of {len(self.tried)} changes that were tried cures it" if self.tried else ""
        control = "is not finite" if not self.control.is_finite else f"leaves {number(self.control.left)}"
        begun = " from new weights" if self.from_start else ""
        ends = f"{self._measure} {number(won.left)} at the end, where the training as it is {control}"
        said = f"tried over {self.steps} steps{begun}, “{won.label}” cures it: {ends}. So {won.cause}. {won.advice}"
        return said.rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; floats that are not finite as "nan", "inf" and "-inf"."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("control", "tried")}
        return {**plain, "control": self.control.to_json(), "tried": [each.to_json() for each in self.tried]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WhatIf:
        """Return what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known |= {"control": Tried.from_json(data["control"]), "tried": tuple(map(Tried.from_json, data["tried"]))}
        known |= {name: float(known[name]) for name in ("before", "seconds") if name in known}
        known |= {"steps": int(known.get("steps", 0)), "not_tried": dict(known.get("not_tried", {}))}
        if not isinstance(known.get("why_not", ""), str):
            raise TypeError("`why_not` is no text")
        return cls(**known)

    @property
    def _measure(self) -> str:
        return "unexplained share" if self.measure == "unexplained" else "loss"

    def _headline(self) -> str:
        if self.why_not:
            return f"What if: not seen: {self.why_not}"
        won = self.winner
        word = f"“{won.label}” cures it" if won else "no change cures it"
        begun = ", from new weights" if self.from_start else ""
        return f"What if: {word} ({len(self.tried)} changes, {self.steps} steps each{begun}, {self.seconds:.1f} s)"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [("as it is", "", *_numbers(self.control))]
        return rows + [(each.label, "cures" if each.cures else "", *_numbers(each)) for each in self.tried]

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.why_not:
            return lines[0]
        if self.winner is not None:
            lines.append(f"  {self.winner.cause}. {self.winner.advice}")
        rows = [("", "", "loss of the steps", self._measure), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.not_tried:
            lines.append(f"  {len(self.not_tried)} more were not tried: see `not_tried`")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = ("change", "", "loss of the steps", self._measure)
        rows = [(escape(a), told(b, "good") if b else "", escape(c), escape(d)) for a, b, c, d in self._rows()]
        left = "".join(f"<div>not tried: {escape(name)} ({escape(why)})</div>" for name, why in self.not_tried.items())
        more = f"<details><summary>not tried</summary>{left}</details>" if left else ""
        won = self.winner
        said = f"<div>{escape(f'{won.cause}. {won.advice}')}</div>" if won else ""
        tone = "unseen" if self.why_not else "good" if won else "warning"
        return card(self._headline(), tone, said, table(heads, rows) if self.tried else "", more)


def _numbers(tried: Tried) -> tuple[str, str]:
    losses = tried.losses
    way = f"{number(losses[0])} to {number(losses[-1])}" if losses else ""
    return way, number(tried.left) if tried.is_finite else "not finite"


def _in_order(tried: Sequence[Tried]) -> list[Tried]:
    cures = [each for each in tried if each.cures]
    best = max((each.gain for each in cures), default=0.0)
    near = [each for each in cures if each.gain >= NEAR * best]
    near.sort(key=lambda each: (CHANGE_KINDS.index(each.kind), -each.gain))
    rest = [each for each in tried if not any(each is known for known in near)]
    rest.sort(key=lambda each: (not each.cures, -each.gain if isfinite(each.gain) else float("inf")))
    return [*near, *rest]


def gain_of(left: float, control: float, *, measure: str, start: float) -> float:
    """Return the share of what the control leaves that is taken away.

    Args:
        left, control: after the steps, with and without the change; not finite: it diverged.
        measure: what they are.
        start: before the steps.
    """
    if not isfinite(left):
        return float("-inf")
    if measure == "unexplained":
        # What stays finite where nothing did has done more than learn.
        control = control if isfinite(control) else 2.0
        return (control - left) / max(control, LEAST)
    control = control if isfinite(control) else max(start, left + abs(left)) if isfinite(start) else left + abs(left)
    scale = max(abs(control), abs(start) if isfinite(start) else 0.0)
    return (control - left) / scale if scale and not isinf(scale) else 0.0
