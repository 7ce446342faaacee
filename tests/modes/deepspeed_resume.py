"""What ranks run to save a training of DeepSpeed's ZeRO, and another number of them to go on with it.

DeepSpeed's own checkpoints are bound to the number of ranks, unless they are made universal: the weights are taken out
whole here, as its accessors give them, under an optimizer that remembers nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.treatments import ZClip
from tests.modes.deepspeed_cases import Form, engine_of, masters
from tests.modes.ranks import equal_on_all_ranks, main
from tests.modes.reference import Net, loss_of, same
from tests.modes.resume_cases import NOT_FINITE, SAVED_AFTER, SPIKES, STEPS, data, told, watched


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def begin(stage: int, world: int, net: nn.Module) -> tuple[Any, Watch]:
    engine = engine_of(net, Form(stage), world, plain)
    return engine, watched(engine, None, ZClip(warmup=20))


def go(engine: Any, watch: Watch, steps: Iterable[int], rank: int, world: int) -> None:
    for step in steps:
        pair = tuple(t.float().chunk(world)[rank] for t in data()[step])
        loss = loss_of(engine, pair) * SPIKES.get(step, 1.0)
        if step in NOT_FINITE and rank == world - 1:
            loss = loss * math.nan
        engine.backward(loss)
        watch.step(loss=loss.detach())
    equal_on_all_ranks(same(watch.history))


def save(stage: int) -> Any:
    def case(rank: int, world: int, folder: Path) -> None:
        engine, watch = begin(stage, world, Net())
        go(engine, watch, range(SAVED_AFTER), rank, world)
        state = {"model": masters(engine), "watch": watch.state_dict()}
        if rank == 0:
            torch.save(state, folder / "saved")
        watch.close()
        engine.destroy()

    return case


def resume(stage: int) -> Any:
    def case(rank: int, world: int, folder: Path) -> None:
        state = torch.load(folder / "saved")
        net = Net()
        net.load_state_dict(state["model"])
        engine, watch = begin(stage, world, net)
        watch.load_state_dict(state["watch"])
        assert watch.num_steps == SAVED_AFTER
        go(engine, watch, range(SAVED_AFTER, STEPS), rank, world)
        watch.close()
        equal_on_all_ranks([str(i) for i in watch.incidents])
        if rank == 0:
            (folder / "seen.json").write_text(json.dumps(told(watch)))
        engine.destroy()

    return case


CASES = {f"save-zero-{n}": save(n) for n in (1, 2, 3)} | {f"resume-zero-{n}": resume(n) for n in (1, 2, 3)}

if __name__ == "__main__":
    # The engine chooses its device before anything else is known of it.
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(CASES)
