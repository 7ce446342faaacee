"""torch.compile of a whole step compiles the user's program, and nothing of gradwatch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch.nn import functional as F

import gradwatch
from gradwatch import Watch

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PACKAGE = str(Path(gradwatch.__file__).parent)
EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "rules": "autoclip"}
STEPS = 4
Step = Callable[[nn.Module, Any, Tensor], Tensor]


def forward_and_backward(model: nn.Module, watch: Watch | None, x: Tensor) -> Tensor:
    loss = F.mse_loss(model(x), x)
    loss.backward()
    return loss


def only_loss_and_backward(model: nn.Module, watch: Watch | None, x: Tensor) -> Tensor:
    loss = F.mse_loss(apart(model, x), x)
    loss.backward()
    return loss


@torch.compiler.disable
def apart(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def all_of_it(model: nn.Module, watch: Watch | None, x: Tensor) -> Tensor:
    loss = forward_and_backward(model, watch, x)
    if watch is not None:
        watch.step(loss=loss)
    return loss


def trained(step: Step, options: dict[str, Any] | None) -> tuple[list[Tensor], set[str]]:
    """Return losses and weights, and the files of the functions that were compiled."""
    torch._dynamo.reset()
    clear_compilation_metrics()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = None if options is None else Watch(model, optimizer, **options)
    compiled = torch.compile(step, backend="eager")
    found = []
    for _ in range(STEPS):
        found.append(compiled(model, watch, torch.randn(8, 4)).detach())
        if watch is None:
            optimizer.step()
        elif step is not all_of_it:
            watch.step(loss=found[-1])
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
        assert [record.global_norm is not None for record in watch.history] == [True] * STEPS
    files = {str(metrics.co_filename) for metrics in get_compilation_metrics()}
    return [*found, *(p.detach() for p in model.parameters())], files


@pytest.mark.parametrize("step", [forward_and_backward, only_loss_and_backward, all_of_it])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param(EVERYTHING, id="everything"),
        pytest.param({"activations_every": 1, "backward": "full"}, id="full"),
        pytest.param({"autopsy": True, "fingerprints": True, "recompute_every": 2, "rules": "ahead"}, id="ahead"),
    ],
)
def test_nothing_of_a_watch_is_compiled_with_a_step(step: Step, options: dict[str, Any]) -> None:
    bare, files = trained(step, None)
    assert __file__ in files
    watched, watched_files = trained(step, options)
    assert all(map(torch.equal, bare, watched))
    assert not [file for file in watched_files if file.startswith(PACKAGE)]
