"""Laws that every treatment keeps."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..protocols import Treatment, as_treatment
from ..requests import Request, checked_request
from ..stats import Gradients

__all__ = ["TestContext", "check_treatment"]


@dataclass
class TestContext:
    """A `Context` to call a treatment with: remembers what it asks for."""

    __test__ = False  # no test class, whatever pytest makes of its name

    step: int = 0
    optimizers: tuple[Any, ...] = ()
    rule: str = ""
    trigger: Any = True
    limit: float | None = 1.0
    findings: tuple[Any, ...] = ()
    can_read: bool = True
    vetoes: list[Any] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def veto(self, flag: Any = True, *, reason: str = "") -> None:
        self.vetoes.append((flag, reason))

    def request(self, request: Request) -> None:
        self.requests.append(checked_request(request))


def check_treatment(treatment: Treatment) -> None:
    """Raise where a treatment breaks a law that gradwatch relies on. The treatment given stays as it is.

    * `apply_` changes gradients alone: no value of a parameter, no shape, dtype or device of a gradient;
    * it reports a mapping of names to numbers (or 0-dim tensors), or nothing;
    * finite gradients stay finite at sizes from 1e-20 to 1e20, and zero ones raise nothing;
    * gradients that are not finite do not make it raise, nor poison its memory: afterwards it treats finite ones well;
    * with an untriggered rule behind it, it changes nothing;
    * its memory survives a checkpoint (`torch.save`, loaded with `weights_only=True`), and the same history gives the
      same gradients.

    Args:
        treatment: set up as it will be used, bound to no model.

    Raises:
        AssertionError: which law, and what was seen.
    """
    try:
        treatment = as_treatment(treatment)
    except ConfigError as error:
        raise AssertionError(f"broken law: {error}") from None
    name = treatment.name
    for scale in (1.0, 1e-20, 1e20, 0.0):
        _keeps_finite(copy.deepcopy(treatment), name, scale)
    for bad in (float("nan"), float("inf")):
        _bears(copy.deepcopy(treatment), name, bad)
    _rests_untriggered(copy.deepcopy(treatment), name)
    _survives_a_checkpoint(treatment, name)


def _model(seed: int, scale: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return model


def _apply(treatment: Treatment, model: nn.Module, step: int = 0, **settings: Any) -> Mapping[str, Any]:
    grads = Gradients.collect(list(model.named_parameters()))
    context: Any = TestContext(step=step, **settings)
    with torch.no_grad():
        report = treatment.apply_(grads, context)
    _law(report is None or isinstance(report, Mapping), f"{treatment.name}: apply_ returns a mapping or None")
    for key, value in (report or {}).items():
        is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
        plain = isinstance(value, (int, float, bool)) or is_one
        _law(plain, f"{treatment.name}: it reports numbers. {key!r} is {type(value).__name__}")
    return report or {}


def _keeps_finite(treatment: Treatment, name: str, scale: float) -> None:
    model = _model(0, scale)
    values = [p.detach().clone() for p in model.parameters()]
    kinds = [(p.grad.shape, p.grad.dtype, p.grad.device) for p in model.parameters() if p.grad is not None]
    for step in range(3):
        _apply(treatment, model, step)
    for p, value in zip(model.parameters(), values, strict=True):
        _law(torch.equal(p.detach(), value), f"{name}: apply_ leaves the parameters' values alone")
        finite = p.grad is None or bool(torch.isfinite(p.grad).all())
        _law(finite, f"{name}: finite gradients stay finite. At size {scale:g} they did not")
    now = [(p.grad.shape, p.grad.dtype, p.grad.device) for p in model.parameters() if p.grad is not None]
    _law(all(kind in kinds for kind in now), f"{name}: gradients keep shape, dtype and device")


def _bears(treatment: Treatment, name: str, bad: float) -> None:
    poisoned = _model(1)
    for p in list(poisoned.parameters())[:1]:
        assert p.grad is not None
        p.grad.view(-1)[0] = bad
    _apply(treatment, poisoned, 0)
    for step in range(1, 4):
        model = _model(step)
        _apply(treatment, model, step)
        finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        _law(finite, f"{name}: a gradient of {bad} leaves the next steps' finite gradients finite")


def _rests_untriggered(treatment: Treatment, name: str) -> None:
    for trigger in (False, torch.tensor(False)):
        model = _model(2)
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        _apply(treatment, model, rule="exploding", trigger=trigger)
        after = [p.grad for p in model.parameters()]
        same = all(g is not None and torch.equal(g, b) for g, b in zip(after, before, strict=True))
        _law(same, f"{name}: behind a rule that did not fire it changes nothing")


def _survives_a_checkpoint(treatment: Treatment, name: str) -> None:
    whole, first, second = (copy.deepcopy(treatment) for _ in range(3))
    steps = range(40)
    expected = [_treated(whole, step) for step in steps]
    for step in steps[:20]:
        _treated(first, step)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in steps[20:]:
        same = all(torch.equal(a, b) for a, b in zip(_treated(second, step), expected[step], strict=True))
        _law(same, f"{name}: after a checkpoint it treats step {step} as it would have without one")


def _treated(treatment: Treatment, step: int) -> list[Tensor]:
    model = _model(step, scale=100.0 if step % 9 == 8 else 1.0)
    _apply(treatment, model, step)
    return [p.grad for p in model.parameters() if p.grad is not None]


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(f"broken law: {text}.")
