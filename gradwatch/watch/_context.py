"""What a treatment is told about the step, and what it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..records import Finding, StepRecord
from ..requests import Request, StopTraining, checked_request

__all__ = ["Decision", "StepContext", "StepOutcome"]


@dataclass
class Decision:
    """What the treatments and actions of one step ask for, together.

    Attributes:
        veto: True, False, or a 0-dim bool tensor on the device.
        reasons: of the vetoes.
        requests: what actions ask of the trainer.
    """

    veto: bool | Tensor = False
    reasons: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def add_veto(self, flag: bool | Tensor, reason: str) -> None:
        if flag is False:
            return
        if reason:
            self.reasons.append(reason)
        if flag is True or self.veto is True:
            self.veto = True
        elif self.veto is False:
            self.veto = flag
        else:
            self.veto = torch.logical_or(torch.as_tensor(self.veto), torch.as_tensor(flag))


@dataclass
class StepOutcome:
    """What came of one step.

    Attributes:
        skip: the optimizer must not move anything (it will not: a gate sees to it). None where that is decided on the
            device, and not known here yet.
        requests: what actions ask of the trainer.
        ask: returns the record and the findings, where somebody wants them; None once the watch is gone.
    """

    skip: bool | None = False
    requests: Sequence[Request] = ()
    ask: Callable[[], tuple[StepRecord | None, Sequence[Finding]] | None] | None = field(default=None, repr=False)

    @property
    def record(self) -> StepRecord | None:
        """What was measured; None while its numbers are on their way from the device."""
        found = None if self.ask is None else self.ask()
        return None if found is None else found[0]

    @property
    def findings(self) -> Sequence[Finding]:
        """What the rules saw in it, those apart that wait for the optimizer's step; none while its numbers are on their
        way."""
        found = None if self.ask is None else self.ask()
        return () if found is None else found[1]


@dataclass
class StepContext:
    """`gradwatch.protocols.Context` of one treatment at one step."""

    step: int
    optimizers: Sequence[Optimizer]
    decision: Decision
    rule: str = ""
    trigger: Any = True
    limit: float | None = None
    findings: Sequence[Finding] = ()
    can_read: bool = True
    is_treatment: bool = False

    def veto(self, flag: Any = True, *, reason: str = "") -> None:
        self.decision.add_veto(flag if isinstance(flag, Tensor) else bool(flag), reason)

    def request(self, request: Request) -> None:
        asked = checked_request(request)
        if self.is_treatment and isinstance(asked, StopTraining):
            # A treatment asks for a stop when its means are exhausted: the run must not end as a success.
            asked = replace(asked, as_error=True)
        self.decision.requests.append(asked)
