"""States of a run, as checkpoints keep them: the whole file, and what is in it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import ClipToLimit, SkipStep, ZClip

from ..kind import Kind, Reading

NASTY = [None, True, -1, 7, 1e300, math.nan, "", "many", [], [1, 2], {}, {"x": 1}, (1,), "\ud800", b"\0"]


def watched() -> tuple[Watch, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    rules = [Exploding(then=ClipToLimit()), NonFinite(then=SkipStep())]
    return Watch(model, torch.optim.SGD(model.parameters(), 1e-2), rules=rules, treatments=[ZClip()]), model


def step(watch: Watch, model: nn.Module) -> None:
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    watch.step(loss=loss)
    watch.optimizers[0].zero_grad()


class Saved(Kind):
    share = 0.5

    def make(self, folder: Path) -> None:
        watch, model = watched()
        with watch:
            for _ in range(30):
                step(watch, model)
            torch.save(watch.state_dict(), folder / "state.pt")

    def read(self, folder: Path) -> Reading:
        state = torch.load(folder / "state.pt", weights_only=False)
        watch, model = watched()
        with watch:
            watch.load_state_dict(state)
            memory = watch.session.state_dict()
            step(watch, model)
        return Reading({("step", watch.num_steps), ("digest", memory["digest"])})


class States(Saved):
    """What is in the file: one entry is another."""

    name = "states"

    def damage(self, folder: Path, rng: np.random.Generator) -> str:
        file = folder / "state.pt"
        state = torch.load(file, weights_only=True)
        everywhere = list(_places(state))
        path, new = everywhere[int(rng.integers(len(everywhere)))], NASTY[int(rng.integers(len(NASTY)))]
        torch.save(_changed(state, path, new), file)
        return f"{path} is {new!r}"


class Checkpoints(Saved):
    """The bytes of the file: what does not load is torch's to say, what loads is ours."""

    name = "checkpoints"

    def read(self, folder: Path) -> Reading:
        try:
            state = torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)
        except Exception as error:
            return Reading(refused=f"torch: {type(error).__name__}")
        torch.save(state, folder / "state.pt")
        return super().read(folder)


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield (*above, key)
        yield from _places(inner, (*above, key))


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: _changed(value[path[0]], path[1:], new)}
    return type(value)(_changed(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value))
