"""What a group of ranks runs to save a training in pieces or stages, and one of another size to go on with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType, fully_shard

from gradwatch import Watch
from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import ClipToLimit, SkipStep, ZClip
from tests.modes import flat_cases, pipeline_cases
from tests.modes.ranks import equal_on_all_ranks, main
from tests.modes.reference import Net, batches, loss_of, same, sgd

STEPS, SAVED_AFTER = 44, 30
# One that is over when the run is saved, one that goes on, one that comes after.
NOT_FINITE, SPIKES = (1, 40), {28: 1e4, 36: 1e4}


def watched(net: Any, optimizer: Any, treatments: Any = ()) -> Watch:
    rules = [
        Exploding(then=[ClipToLimit()], keep_firing_for=3, cooldown=0),
        NonFinite(then=[SkipStep(max_consecutive=10)], keep_firing_for=3, cooldown=0, inhibit_for=0),
    ]
    return Watch(net, optimizer, rules=rules, treatments=treatments, on_error="raise", updates_every=1)


def data() -> list[tuple[Tensor, Tensor]]:
    """Return the batches of the whole, in float64: as many rows whatever the number of ranks."""
    return [(pair[0].double(), pair[1].double()) for (pair,) in batches(4, STEPS)]


def go(
    net: nn.Module, watch: Watch, optimizer: torch.optim.Optimizer, steps: Iterable[int], rank: int, world: int
) -> Iterator[int]:
    """Train with this rank's share of each batch; where a batch is bad it is bad on the last rank.

    Yields the step while its gradients lie complete in `.grad`, before they are looked at.
    """
    for step in steps:
        pair = tuple(t.chunk(world)[rank] for t in data()[step])
        loss = loss_of(net, pair) * SPIKES.get(step, 1.0)
        if step in NOT_FINITE and rank == world - 1:
            loss = loss * math.nan
        loss.backward()
        yield step
        watch.step(loss=loss)
        optimizer.zero_grad()


def built(world: int) -> tuple[nn.Module, torch.optim.Optimizer, Watch]:
    net = Net().double()
    mesh = init_device_mesh("cpu", (world,))
    for layer in net.body:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = sgd(net)
    return net, optimizer, watched(net, optimizer, ZClip(warmup=20))


def save(rank: int, world: int, folder: Path) -> None:
    """Train to `SAVED_AFTER` and write everything with `torch.distributed.checkpoint`."""
    net, optimizer, watch = built(world)
    list(go(net, watch, optimizer, range(SAVED_AFTER), rank, world))
    equal_on_all_ranks(same(watch.history))
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "watch": watch}, checkpoint_id=folder / "saved")
    watch.close()


def resume(rank: int, world: int, folder: Path) -> None:
    """Go on from what lies in `folder / "saved"`, and tell what was seen."""
    net, optimizer, watch = built(world)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "watch": watch}
    dcp.load(state, checkpoint_id=folder / "saved")
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert watch.num_steps == SAVED_AFTER
    list(go(net, watch, optimizer, range(SAVED_AFTER, STEPS), rank, world))
    watch.close()
    equal_on_all_ranks(same(watch.history))
    equal_on_all_ranks([str(i) for i in watch.incidents])
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(told(watch)))


def built_flat(uses_views: bool) -> tuple[FSDP, torch.optim.Optimizer, Watch]:
    model = flat_cases.wrapped(Net().double(), flat_cases.Form(uses_views))
    optimizer = sgd(model)
    return model, optimizer, watched(model, optimizer, ZClip(warmup=20))


def save_flat(rank: int, world: int, folder: Path) -> None:
    """Train an FSDP1 model to `SAVED_AFTER` and write everything whole."""
    model, optimizer, watch = built_flat(uses_views=False)
    list(go(model, watch, optimizer, range(SAVED_AFTER), rank, world))
    equal_on_all_ranks(same(watch.history))
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = {"model": model.state_dict(), "optimizer": FSDP.optim_state_dict(model, optimizer)}
    if rank == 0:
        torch.save({**state, "watch": watch.state_dict()}, folder / "saved")
    watch.close()


def resume_flat(rank: int, world: int, folder: Path) -> None:
    """Go on from it, with views for flat parameters."""
    state = torch.load(folder / "saved")
    model, optimizer, watch = built_flat(uses_views=True)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, state["optimizer"]))
    watch.load_state_dict(state["watch"])
    assert watch.num_steps == SAVED_AFTER
    list(go(model, watch, optimizer, range(SAVED_AFTER, STEPS), rank, world))
    watch.close()
    equal_on_all_ranks(same(watch.history))
    equal_on_all_ranks([str(i) for i in watch.incidents])
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(told(watch)))


def begin_pipeline(world: int, num_stages: int, factor: list[float]) -> tuple[pipeline_cases.Run, Watch]:
    """Return a pipeline of so many stages, as often as there are ranks for it."""
    run = pipeline_cases.begin(
        pipeline_cases.Form(),
        world,
        net=lambda: pipeline_cases.Deep().double(),
        loss=lambda out, y: (out - y).square().mean() * factor[0],
        num_ranks=num_stages,
    )
    return run, watched(run.schedule, run.optimizers, ZClip(warmup=20))


def go_in_stages(run: pipeline_cases.Run, watch: Watch, factor: list[float], steps: Iterable[int]) -> None:
    for step in steps:
        pair = tuple(t.chunk(run.at_once)[run.number] for t in data()[step])
        is_bad = step in NOT_FINITE and run.number == run.at_once - 1
        factor[0] = SPIKES.get(step, 1.0) * (math.nan if is_bad else 1.0)
        watch.step(loss=pipeline_cases.one_step(run, pair))
        for optimizer in run.optimizers:
            optimizer.zero_grad()


def save_stages(rank: int, world: int, folder: Path) -> None:
    """Train two stages, as often as there are ranks for it, and write what each rank has by its names."""
    factor = [1.0]
    run, watch = begin_pipeline(world, 2, factor)
    go_in_stages(run, watch, factor, range(SAVED_AFTER))
    equal_on_all_ranks(same(watch.history))
    found = {name.removeprefix("module."): p for part in run.modules for name, p in part.named_parameters()}
    states = {name: o.state[p]["momentum_buffer"] for name, p in found.items() for o in run.optimizers if p in o.state}
    (folder / "saved").mkdir(exist_ok=True)
    saved = {"model": {name: p.detach() for name, p in found.items()}, "optimizer": states, "watch": watch.state_dict()}
    torch.save(saved, folder / "saved" / str(rank))
    watch.close()


def resume_stages(num_stages: int | None) -> Any:
    """Go on in another number of stages; None: in the whole model, by one process."""

    def case(rank: int, world: int, folder: Path) -> None:
        saved = [torch.load(file) for file in sorted((folder / "saved").iterdir())]
        factor = [1.0]
        if num_stages is None:
            net = pipeline_cases.Deep().double()
            optimizer = sgd(net)
            parts, optimizers, watch = [net], [optimizer], watched(net, optimizer, ZClip(warmup=20))
        else:
            run, watch = begin_pipeline(world, num_stages, factor)
            parts, optimizers = list(run.modules), list(run.optimizers)
        for part, optimizer in zip(parts, optimizers, strict=True):
            for name, p in part.named_parameters():
                (known, *_) = [s for s in saved if name.removeprefix("module.") in s["model"]]
                p.data.copy_(known["model"][name.removeprefix("module.")])
                optimizer.state[p]["momentum_buffer"] = known["optimizer"][name.removeprefix("module.")].clone()
        watch.load_state_dict(saved[0]["watch"])
        assert watch.num_steps == SAVED_AFTER
        steps = range(SAVED_AFTER, STEPS)
        if num_stages is None:
            list(go(parts[0], watch, optimizers[0], steps, rank, world))
        else:
            go_in_stages(run, watch, factor, steps)
        watch.close()
        equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
        if rank == 0:
            (folder / "seen.json").write_text(json.dumps(told(watch)))

    return case


def told(watch: Watch) -> dict[str, Any]:
    """Return what must not depend on the number of ranks, nor on where the run was cut."""
    return {
        "num_steps": watch.num_steps,
        "num_skipped": watch.session.engine.completion.num_skipped,
        "incidents": [
            [i.rule, i.first_step, i.last_step, i.resolved_step, sorted(i.paths), list(i.treatments)]
            for i in watch.incidents
        ],
        "steps": [
            {
                "step": r.step,
                "skipped": r.skipped,
                "norms": [r.global_norm, *r.columns["grad_norm"][r.measured("grad_norm")].tolist()],
                "after": r.global_norm_after,
                "limit": r.scalars.get("limit", math.nan),
                "loss": r.loss,
                "treated": [[t.name, t.applied] for t in r.treatments],
            }
            for r in watch.history
        ],
    }


CASES = {
    "save": save,
    "resume": resume,
    "save-flat": save_flat,
    "resume-flat": resume_flat,
    "save-stages": save_stages,
    "resume-whole": resume_stages(None),
    **{f"resume-in-{n}-stages": resume_stages(n) for n in (1, 2, 4)},
}

if __name__ == "__main__":
    main(CASES)
