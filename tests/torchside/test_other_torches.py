"""What another torch lacks, or says otherwise, ends nothing and makes nothing wrong."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch import Watch
from gradwatch.hooks import HookManager
from gradwatch.torchside import _checkpoints, accelerator


def test_no_accelerator_may_be_said_by_an_exception(monkeypatch):
    def none_is_available():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", none_is_available)
    assert accelerator() is None
    model = nn.Linear(4, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), on_error="raise", autopsy=True) as watch:
        for _ in range(2):
            loss = model(torch.ones(2, 4)).mean()
            loss.backward()
            watch.step(loss=loss)
    assert len(watch.history) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("port", ["output", "grad_output"])
def test_without_a_look_at_saved_tensor_hooks_checkpoints_are_found_all_the_same(monkeypatch, port, reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.is_checkpointed = nn.Linear(4, 4), nn.Linear(4, 4), False

        def part(self, x):
            return self.b(torch.tanh(self.a(x)))

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=reentrant) if self.is_checkpointed else self.part(x)

    monkeypatch.setattr(_checkpoints, "_top_hooks", None)
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4, requires_grad=True)
    hooks, found = HookManager(model), []
    for model.is_checkpointed in (False, True):
        model.zero_grad()
        hooks.run_with_hooks(x, hooks=[(f"a:{port}", lambda tensor, point: tensor * 3)]).sum().backward()
        found.append(model.a.weight.grad.clone())
    assert torch.equal(*found)
