"""`torch.jit.script` compiles a model that is watched, and what it makes of it holds nothing of gradwatch's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.hooks import HookManager

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))


@contextmanager
def watched(model: nn.Module) -> Iterator[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, activations_every=1, fingerprints=True, autopsy=True) as watch:
        yield watch


@contextmanager
def hooked(model: nn.Module) -> Iterator[Any]:
    with HookManager(model) as hooks:
        hooks.add("*:output", lambda tensor, point: None)
        hooks.add("*:input", lambda tensor, point: None)
        hooks.monitor("*:output")
        yield hooks


@pytest.mark.parametrize("door", [watched, hooked])
def test_a_model_with_our_hooks_is_scripted_without_them(door: Any) -> None:
    model, x = net(), torch.randn(3, 4)
    with door(model):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scripted.modules())
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert "gradwatch" not in file.getvalue().decode("latin-1")


def test_a_hook_of_the_users_is_scripted_all_the_same() -> None:
    def doubled(self: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 2

    model, x = net(), torch.randn(3, 4)
    model[0].register_forward_hook(doubled)
    with watched(model):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))


def test_a_watch_goes_on_measuring_after_its_model_was_scripted() -> None:
    model = net()
    with watched(model) as watch:
        for _ in range(4):
            torch.jit.script(model)
            loss = model(torch.randn(3, 4)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            watch.optimizers[0].zero_grad()
        assert all(record["output_rms", "0"] > 0 for record in watch.history)
