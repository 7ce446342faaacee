"""Watching changes no bit of any module that torch has, plain and with an in-place operation after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from tests.modes.reference import EVERYTHING

MANY = 16  # samples of one module: of those with more (one has nearly a thousand) every n-th is tried
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]


class After(nn.Module):
    """A module, and perhaps an in-place operation on what it gives."""

    def __init__(self, inner: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        return torch.relu_(first) if self.in_place and isinstance(first, Tensor) else first


def fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point() or value.is_complex())
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(v) for v in value)
    return value


def run(info: Any, sample: Any, in_place: bool, watched: bool) -> list[Tensor] | None:
    torch.manual_seed(0)
    made, given = sample.constructor_input, sample.forward_input
    model = After(info.module_cls(*made.args, **made.kwargs).float(), in_place).train()
    args, kwargs = fresh(list(given.args)), {k: fresh(v) for k, v in given.kwargs.items()}
    dummy = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), dummy], lr=0.01)
    watch = Watch(model, optimizer, on_error="raise", **EVERYTHING) if watched else None
    try:
        torch.manual_seed(1)
        try:
            out = model(*[a * 1 if isinstance(a, Tensor) and a.requires_grad else a for a in args], **kwargs)
            loss = (out * dummy).sum() if out.is_floating_point() else out.abs().sum() * dummy
            loss.backward()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return [torch.tensor([ord(c) for c in f"{type(error).__name__}"])]
        inputs = [a.grad for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and a.grad is not None]
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=loss.detach().real)
        return [loss.detach(), *inputs, *grads, *model.parameters(), *model.buffers(), torch.get_rng_state()]
    finally:
        if watch is not None:
            watch.close()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))


def test_samples_of_every_module_of_torch_train_to_the_same_bits() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    count, failed, wrong = 0, 0, []
    for info in module_db:
        if "Lazy" in info.module_cls.__name__:
            continue
        samples = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
        numbered = list(enumerate(samples))
        for number, sample in numbered[:: 1 + len(numbered) // MANY]:
            for in_place in (False, True):
                bare, seen = (run(info, sample, in_place, watched) for watched in (False, True))
                count += 1
                failed += len(bare) == 1
                if len(bare) != len(seen) or not all(same(a, b) for a, b in zip(bare, seen, strict=True)):
                    wrong.append((info.name, number, in_place))
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:20]}"
    assert count > 800, count
    assert failed < count / 4, failed
