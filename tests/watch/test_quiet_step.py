"""A step at which nothing is due: how much of it runs in Python, and that it misses nothing all the same."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradwatch
from gradwatch import Watch

ROOT = str(Path(gradwatch.__file__).parent)
ODD = 21
"""A step after the first cadences, at which nothing is due."""


def mlp(num_layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))


def calls_of(step: Callable[[], None]) -> int:
    """Return how many Python functions of gradwatch a step calls."""
    found = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(ROOT)

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def quiet_calls(num_layers: int, rules: str) -> int:
    model = mlp(num_layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, rules=rules) as watch:

        def step() -> None:
            model(torch.ones(2, 4)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()

        for _ in range(36):
            step()
        return min(calls_of(step) for _ in range(8))


@pytest.mark.parametrize("rules", ["observe", "default"])
def test_a_quiet_step_makes_a_few_calls_however_many_tensors_and_rules_there_are(rules: str) -> None:
    few, many = quiet_calls(2, rules), quiet_calls(16, rules)
    assert few == many
    assert many <= 120


@contextmanager
def a_hook_on_the_optimizer(optimizer: torch.optim.Optimizer, clip: Callable[..., None]) -> Iterator[None]:
    handle = optimizer.register_step_pre_hook(clip)
    yield
    handle.remove()


@contextmanager
def a_hook_on_all_optimizers(optimizer: torch.optim.Optimizer, clip: Callable[..., None]) -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(clip)
    yield
    handle.remove()


@contextmanager
def a_step_of_its_own(optimizer: torch.optim.Optimizer, clip: Callable[..., None]) -> Iterator[None]:
    own = optimizer.step

    def step(closure: Any = None) -> Any:
        clip()
        return own(closure)

    optimizer.step = step  # type: ignore[method-assign]
    yield
    del optimizer.step


@pytest.mark.parametrize("place", [a_hook_on_the_optimizer, a_hook_on_all_optimizers, a_step_of_its_own])
def test_what_clips_at_a_quiet_step_between_watch_and_the_optimizer_is_seen(place: Any) -> None:
    model = mlp(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    num_steps = 0

    def clip(*_: Any) -> None:
        if num_steps == ODD:
            clip_grad_norm_(model.parameters(), 1e-3)

    with place(optimizer, clip), Watch(model, optimizer, rules="observe") as watch:
        for num_steps in range(ODD + 3):  # noqa: B007 - the clip asks
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            watch.step()
        norms = {r.step: (r.global_norm_after, r.global_norm_applied) for r in watch.history}
    assert norms[ODD][1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[ODD][0] > 1e-2
    for step in (ODD - 1, ODD + 1):
        assert norms[step][0] == norms[step][1]
