"""What came of vetoed steps, told: nothing where nothing moved, else what did and whether it was put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..records import Incident
from ..requests import Request, StopTraining
from ._judge import Judge
from ._ranks import world_size
from ._veto import Proof

__all__ = ["Proofs"]

_UNDONE = (
    "The optimizer moves something at a step without gradients. It was put back bit for bit, from copies that are made "
    "at vetoed steps alone: nothing is to be done."
)
_UNPROVEN = (
    "The step is on record as skipped, and moved something all the same. Raise `memory_limit_mb` where copies did not "
    "fit; hand `Watch` the outermost optimizer, whose code writes the weights; else go on from the last checkpoint. "
    "`stop_on_unproven=True` ends the run where this happens."
)


class Proofs:
    """Tells of vetoed steps that moved something: one incident for each optimizer and kind, which grows.

    Args:
        judge: that incidents go to.
        requests: that a stop goes to.
        stops: whether a step that could not be put back ends the training: on all ranks, those too where nothing moved.

    Attributes:
        untold: stops of which the other ranks are to be told before they are asked for.
    """

    def __init__(self, judge: Judge, requests: list[Request], *, stops: bool) -> None:
        self._judge, self._requests, self._stops = judge, requests, stops
        self._told: dict[tuple[str, str], Incident] = {}
        self.untold: list[StopTraining] = []

    def tell(self, proof: Proof, step: int) -> None:
        """Take what came of one vetoed step."""
        if not proof.moved and not proof.left:
            return
        rule = "veto_unproven" if proof.left else "veto_undone"
        message = _sentence(proof)
        self._report(rule, proof, step, message)
        if proof.left and self._stops:
            reason = f"the step was vetoed, and that can't be proven: {message}"
            asked = self._requests if world_size() == 1 else self.untold
            asked.append(StopTraining(reason=reason, as_error=True))

    def take_untold(self) -> int:
        """Return for how many stops the other ranks are to be told of now: all are asked for them then, together."""
        untold, self.untold = self.untold, []
        return len(untold)

    def end(self) -> None:
        """Ask for the stops that nobody can be told of any more."""
        self._requests.extend(self.untold)
        self.untold = []

    def _report(self, rule: str, proof: Proof, step: int, message: str) -> None:
        known = self._told.get((rule, proof.optimizer))
        if known is None:
            self._judge.report(_incident(rule, proof, step, message))
            self._told[rule, proof.optimizer] = self._judge.own[-1]
            return
        grown = replace(
            known,
            count=known.count + (step != known.last_step),
            last_step=step,
            resolved_step=step,
            message=message,
            details=_details(proof),
        )
        self._told[rule, proof.optimizer] = grown
        self._judge.replace(known, grown)
        self._judge.on_incident(grown)


def _incident(rule: str, proof: Proof, step: int, message: str) -> Incident:
    return Incident(
        rule=rule,
        first_step=step,
        last_step=step,
        severity="critical" if proof.left else "info",
        message=message,
        advice=_UNPROVEN if proof.left else _UNDONE,
        resolved=True,
        resolved_step=step,
        details=_details(proof),
    )


def _details(proof: Proof) -> dict[str, object]:
    return {"optimizer": proof.optimizer, "moved": list(proof.moved[:20]), "left": list(proof.left[:20])}


def _sentence(proof: Proof) -> str:
    if not proof.left:
        return f"{proof.optimizer} moved {_listed(proof.moved)} at a vetoed step; all of it was put back"
    return f"{proof.optimizer} moved {_listed(proof.left)} at a vetoed step, and it was not put back: {proof.why}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
