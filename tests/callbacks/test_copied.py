"""What holds something of gradwatch's among its attributes is copied, pickled and saved as if it held none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.hooks import HookManager


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda thing: pickle.loads(pickle.dumps(thing)), id="pickle"),
    pytest.param(saved, id="torch.save"),
]


class Trained(nn.Module):
    """A model that trains itself, and is watched and looked into by itself."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.watch = Watch(self, self.optimizer, run_dir=run_dir, activations_every=1)
        self.hooks = HookManager(self)
        self.hooks.capture("layer:output")
        self.train_on()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def train_on(self) -> None:
        for _ in range(3):
            loss = self(torch.randn(3, 4)).square().mean()
            loss.backward()
            self.watch.step(loss=loss)
            self.optimizer.zero_grad()

    def close(self) -> None:
        self.watch.close()
        self.hooks.close()


@pytest.mark.parametrize("copied", COPIES)
def test_a_model_that_holds_its_watch_is_copied_without_it(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = Trained(tmp_path)
    other = copied(model)
    assert other.watch is None
    assert other.hooks is None
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))
    assert copy.copy(model).watch is copy.copy(model.watch) is model.watch
    model.train_on()
    model.close()
    assert [record.step for record in model.watch.history] == list(range(6))


@pytest.mark.parametrize("copied", COPIES)
def test_a_record_is_copied_whole(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = Trained(tmp_path)
    model.close()
    record = model.watch.history[-1]
    other = copied(record)
    assert (other.step, other.global_norm, dict(other.unseen)) == (record.step, record.global_norm, {})
    assert other["grad_norm", "layer.weight"] == record["grad_norm", "layer.weight"]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("door", [GradWatch, FabricGradWatch, GradWatchCallback])
def test_a_callback_is_copied_with_its_settings_alone(door: Any, copied: Callable[[Any], Any]) -> None:
    given = door(rules="autoclip", run_dir="somewhere", verbose=False)
    other = copied(given)
    assert type(other) is type(given)
    assert (other._run_dir, other._verbose) == ("somewhere", False)
    assert other.incidents == []
