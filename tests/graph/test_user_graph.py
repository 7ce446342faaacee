"""Nothing of gradwatch's is in the user's graph, found in a fresh process each: what runs once warms later tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import Watch
from gradwatch.hooks import HookManager

from .programs import EVERYTHING, Block

ROOT = Path(__file__).parents[2]
CASES = [
    ("plain, non-reentrant", "everything"),
    pytest.param("plain, non-reentrant", "default", marks=pytest.mark.slow),
    pytest.param("plain, plain", "everything", marks=pytest.mark.slow),
    pytest.param("plain, plain", "full", marks=pytest.mark.slow),
    pytest.param("plain, reentrant", "everything", marks=pytest.mark.slow),
    pytest.param("plain, nested", "everything", marks=pytest.mark.slow),
    pytest.param("plain, no early stop", "full", marks=pytest.mark.slow),
    pytest.param("plain, sequential", "default", marks=pytest.mark.slow),
    pytest.param("plain, no random state", "everything", marks=pytest.mark.slow),
    pytest.param("hf, gpt2", "default", marks=pytest.mark.slow),
    pytest.param("hf, llama", "everything", marks=pytest.mark.slow),
    pytest.param("hf, t5", "everything", marks=pytest.mark.slow),
    pytest.param("lightning, automatic", "everything", marks=pytest.mark.slow),
    pytest.param("lightning, manual", "full", marks=pytest.mark.slow),
    pytest.param("fabric", "everything", marks=pytest.mark.slow),
]


def run(*arguments: str) -> dict[str, object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("program", "arm"), CASES)
def test_saved_tensors_weights_and_random_state_are_the_same_watched_and_bare(program: str, arm: str) -> None:
    assert run("tests.graph.programs", program, arm) == {}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Operations, Calls])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_mode_of_the_users_counts_the_same_operations_watched_and_bare(mode: type, autocast: bool) -> None:
    counted = []
    for is_watched in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = Watch(model, optimizer, on_error="raise", **EVERYTHING) if is_watched else None
        for _ in range(2):
            with mode() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(torch.ones(4, 5, 8)).float().square().mean()
                loss.backward()
            counted.append(seen.names)
            if watch is not None:
                watch.step(loss=loss.detach())
        if watch is not None:
            assert {"output_rms", "grad_output_norm"} <= set(watch.history[-1].columns)
            watch.close()
    assert counted[0] == counted[2]
    assert counted[1] == counted[3]


@pytest.mark.parametrize("kind", ["observe", "capture", "monitor", "cache", "gradients", "heads"])
def test_looking_adds_no_saved_tensor(kind: str) -> None:
    saved: dict[bool, list[torch.Size]] = {True: [], False: []}
    for is_watched in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), nn.Linear(8, 3))
        manager = HookManager(model)

        def pack(tensor: Tensor, is_watched: bool = is_watched) -> Tensor:
            saved[is_watched].append(tensor.shape)
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            x = torch.ones(4, 5, 8, requires_grad=True)
            if not is_watched:
                output = model(x)
            elif kind == "cache":
                output, _ = manager.run_with_cache(x, points="*:output")
            else:
                if kind == "observe":
                    manager.observe("*:output", lambda tensor, point: tensor.exp().sum())
                elif kind == "gradients":
                    manager.observe("*:grad_output", lambda tensor, point: tensor.exp().sum())
                elif kind == "capture":
                    manager.capture("*:output", inputs=True)
                else:
                    manager.monitor("*:output")
                output = model(x)
            output.square().sum().backward()
        manager.close()
    assert saved[True] == saved[False]


def test_modules_under_a_transform_are_named_as_not_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = [name for name, _ in model.named_parameters()]

    def loss_of(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().mean()

    with Watch(model, optimizer, on_error="raise", activations_every=1) as watch:
        params = dict(zip(names, model.parameters(), strict=True))
        each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(params, torch.ones(5, 3))
        for name, p in params.items():
            p.grad = each[name].mean(0).detach()
        watch.step()
        assert "torch.func" in watch.session.engine.meter.tap.coverage()["0"]
    assert watch.history[0].global_norm > 0
