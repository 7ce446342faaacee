"""What ranks run under DeepSpeed: ZeRO in every stage, in the precisions and with the offload that a CPU can run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.rules import NonFinite
from gradwatch.treatments import (
    AdaptiveClip,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    EmaClip,
    Rollback,
    SkipStep,
    SpikeClip,
)
from tests.modes import deepspeed_doors
from tests.modes.ranks import counted, equal_on_all_ranks, main
from tests.modes.reference import (
    EVERYTHING,
    ROWS,
    STEPS,
    Net,
    batches,
    compare,
    loss_of,
    mine,
    near,
    same,
    train_in_float64,
)


class Form(NamedTuple):
    """One way to train with DeepSpeed.

    Attributes:
        stage: of ZeRO.
        dtype: of the model.
        micro: micro-batches of a step.
        is_offloaded: the optimizer's states.
        clip: DeepSpeed's own `gradient_clipping`.
        more: entries of `zero_optimization`.
        accumulates: in which type, where that is not the model's.
    """

    stage: int
    dtype: torch.dtype = torch.float32
    micro: int = 1
    is_offloaded: bool = False
    clip: float = 0.0
    more: tuple[tuple[str, Any], ...] = ()
    accumulates: str = ""


WHOLE = {"zero-0": Form(0)}
STAGES = {f"zero-{stage}": Form(stage) for stage in (1, 2, 3)}
# Small enough that nothing is kept whole, and that the parameters are stepped in several groups.
SPLIT = (("stage3_param_persistence_threshold", 0), ("sub_group_size", 300))
FORMS = {
    **STAGES,
    **{f"zero-{stage}-accumulation": Form(stage, micro=2) for stage in (1, 2, 3)},
    **{f"zero-{stage}-offload": Form(stage, is_offloaded=True) for stage in (1, 2, 3)},
    "zero-2-round-robin": Form(2, more=(("round_robin_gradients", True),)),
    "zero-2-overlap": Form(2, more=(("overlap_comm", True), ("reduce_bucket_size", 200))),
    "zero-3-split": Form(3, micro=2, more=SPLIT),
}
CLIPPED = {f"zero-{stage}-clip": Form(stage, clip=0.5) for stage in (1, 2, 3)}
BFLOAT = {f"zero-{stage}-bfloat16": Form(stage, dtype=torch.bfloat16) for stage in (1, 2, 3)}
IN_FLOAT = {"zero-1-bfloat16-in-float32": Form(1, dtype=torch.bfloat16, micro=2, accumulates="fp32")}
HALF = {f"zero-{stage}-float16": Form(stage, dtype=torch.float16) for stage in (1, 2, 3)}


DOORS = ("zero-1", "zero-2-accumulation", "zero-3", "zero-3-split")


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases, as most give them: ZeRO steps one group after the other."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights}, {"params": biases, "lr": 0.03}]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(model), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), lr=0.01, eps=1e-4)


def settings(form: Form, world: int) -> dict[str, Any]:
    # By default buffers of gigabytes.
    zero: dict[str, Any] = {"stage": form.stage, "reduce_bucket_size": 10_000, **dict(form.more)}
    if form.is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    found: dict[str, Any] = {
        "train_batch_size": ROWS * world * form.micro,
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": form.micro,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": form.clip,
    }
    if form.dtype is torch.float16:
        found["fp16"] = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 1000, "hysteresis": 1}
    if form.accumulates:
        found["data_types"] = {"grad_accum_dtype": form.accumulates}
    if form.dtype is torch.bfloat16:
        found["bf16"] = {"enabled": True}
    return found


def engine_of(net: nn.Module, form: Form, world: int, optimizer: Any = sgd) -> Any:
    # Here, since it takes seconds, and the table of all cases has no use for it.
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    if form.dtype is torch.float16:
        # It refuses processors without instructions of their own for float16; torch computes in it on all.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    engine, _, _, _ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=settings(form, world))
    return engine


def fit(
    form: Form,
    rank: int,
    world: int,
    *,
    watched: bool = True,
    bad: dict[int, int] | None = None,
    spikes: dict[int, float] | None = None,
    steps: int = STEPS,
    optimizer: Any = sgd,
    **options: Any,
) -> tuple[Any, Watch | None]:
    """Train a model, and return its engine with its watch (closed)."""
    engine = engine_of(Net(), form, world, optimizer)
    watch = Watch(engine, **{"rules": "observe", "on_error": "raise", **EVERYTHING, **options}) if watched else None
    for step, parts in enumerate(batches(world, steps, form.micro)):
        for part in parts:
            x, y = (t.to(form.dtype) for t in mine(part, rank))
            loss = loss_of(engine, (x, y)) * (spikes or {}).get(step, 1.0)
            if (bad or {}).get(step) == rank:
                loss = loss * math.nan
            engine.backward(loss)
            if watch is None:
                engine.step()
            else:
                watch.step(loss=loss.detach(), batch=(x, y))
    if watch is not None:
        watch.close()
        assert watch.num_steps == engine.global_steps == steps
        equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
        assert [r.num_samples for r in watch.history] == [world * ROWS * form.micro] * steps
    return engine, watch


def masters(engine: Any) -> dict[str, Tensor]:
    """The float32 weights, as DeepSpeed puts them together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in engine.module.named_parameters()}


def weights(engine: Any) -> dict[str, Tensor]:
    """The model's own, where a rank has them."""
    if engine.zero_optimization_stage() == 3:
        return masters(engine)
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def against_reference(
    form: Form, rank: int, world: int, *, reference: Any = None, updates: bool = True, **options: Any
) -> tuple[Watch, dict[str, Tensor]]:
    wanted = {"optimizer": sgd, "spikes": options.get("spikes"), **(reference or {})}
    twin, expected = train_in_float64(Net(), batches(world, micro=form.micro), **wanted)
    engine, watch = fit(form, rank, world, **options)
    assert watch is not None
    index = watch.history[0].index
    parameters = [p for p, kind in zip(index.paths, index.kinds, strict=True) if kind == "parameter"]
    assert parameters == [name for name, _ in twin.named_parameters()], parameters
    assert [index.shapes[i] for i in range(len(parameters))] == [tuple(p.shape) for p in twin.parameters()]
    compare(watch.history, expected, rel=1e-5, updates=updates)
    found = weights(engine)
    for name, q in twin.named_parameters():
        torch.testing.assert_close(found[name].double(), q, rtol=1e-4, atol=1e-6)
    engine.destroy()
    return watch, found


def right_and_neutral(form: Form, rank: int, world: int, folder: Path) -> None:
    watch, watched = against_reference(form, rank, world, rules="default")
    assert not watch.incidents, watch.incidents
    # Of several trainings in one process ZeRO-3 spoils some by itself, with nobody watching: the bits must be those of
    # one that it does not.
    assert any(_is_as_unwatched(form, rank, world, watched) for _ in range(3))


def _is_as_unwatched(form: Form, rank: int, world: int, watched: dict[str, Tensor]) -> bool:
    engine, _ = fit(form, rank, world, watched=False)
    unwatched = weights(engine)
    engine.destroy()
    same_here = [all(torch.equal(watched[name], unwatched[name]) for name in watched)] * world
    dist.all_gather_object(same_here, same_here[rank])
    return all(same_here)


def treated(form: Form, rank: int, world: int, folder: Path) -> None:
    """A spike is clipped by the same factor on all ranks, what is not finite on one is skipped on all."""
    watch, _ = against_reference(
        form,
        rank,
        world,
        reference={"max_norm": 0.5, "bad": (4,)},
        spikes={2: 1000.0},
        bad={4: world - 1},
        rules=[NonFinite(then=SkipStep())],
        treatments=ClipByGlobalNorm(0.5),
    )
    assert [r.step for r in watch.history if r.skipped] == [4]
    assert watch.history[2].treatments[0].applied
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


def one_sum(form: Form, rank: int, world: int, folder: Path) -> None:
    """With nothing else due a step costs one all-reduce."""
    engine = engine_of(Net(), form, world)
    with Watch(engine, rules="default", on_error="raise", **dict.fromkeys(EVERYTHING)) as watch:
        for step, (pair,) in enumerate(batches(world)):
            loss = loss_of(engine, mine(pair, rank))
            engine.backward(loss)
            with counted() as made:
                watch.after_backward(loss=loss)
            engine.step()
            watch.after_step()
            assert step == 0 or [op for op, _, _ in made] == ["SUM"], made


def healthy(form: Form, rank: int, world: int, folder: Path) -> None:
    _, watch = fit(form, rank, world, steps=60, rules="autoclip", optimizer=adamw)
    assert watch is not None
    assert not watch.incidents, watch.incidents
    assert not any(t.applied for r in watch.history for t in r.treatments)


def each_treatment(form: Form, rank: int, world: int, folder: Path) -> None:
    """What treatments do to pieces is what they do to whole gradients, in a training of the whole batch."""
    treatments: list[Callable[[], Any]] = [
        lambda: ClipByNorm(0.05),
        lambda: ClipByValue(0.01),
        lambda: AdaptiveClip(0.01),
        lambda: Centralize(),
        lambda: EmaClip(warmup=1),
        lambda: SpikeClip(1.5),
    ]
    for make in treatments:
        engine, watch = fit(form, rank, world, treatments=make(), optimizer=adamw)
        assert watch is not None
        assert any(t.applied for r in watch.history for t in r.treatments), make()
        twin = Net()
        optimizer = adamw(twin)
        with Watch(twin, optimizer, rules="observe", treatments=make(), on_error="raise") as whole:
            for (pair,) in batches(world):
                loss = loss_of(twin, pair)
                loss.backward()
                whole.step(loss=loss)
                optimizer.zero_grad()
        found = weights(engine)
        for name, q in twin.named_parameters():
            torch.testing.assert_close(found[name], q.detach(), rtol=1e-4, atol=2e-6)


def own_clip(form: Form, rank: int, world: int, folder: Path) -> None:
    """The norm on record is the one before DeepSpeed's own clip, which is on record beside it."""
    twin, expected = train_in_float64(Net(), batches(world), optimizer=sgd, max_norm=form.clip)
    engine, watch = fit(form, rank, world, rules="default")
    assert watch is not None
    assert any(want.global_norm > form.clip for want in expected)
    for record, want in zip(watch.history, expected, strict=True):
        near(record.global_norm, want.global_norm, 1e-5, "global norm")
        assert record.scalars["trainer_clip"] == form.clip
    found = weights(engine)
    for name, q in twin.named_parameters():
        torch.testing.assert_close(found[name].double(), q, rtol=1e-4, atol=1e-5)


def in_bfloat16(form: Form, rank: int, world: int, folder: Path) -> None:
    """The norm of the whole is DeepSpeed's own of the same gradients; a step that is not finite is skipped on all."""
    engine = engine_of(Net(), form, world, adamw)
    before: dict[str, Tensor] = {}
    with Watch(engine, rules=[NonFinite(then=SkipStep())], on_error="raise", **EVERYTHING) as watch:
        for step, (pair,) in enumerate(batches(world)):
            x, y = (t.to(form.dtype) for t in mine(pair, rank))
            loss = loss_of(engine, (x, y)).float() * (math.nan if step == 4 and rank == 0 else 1.0)
            engine.backward(loss)
            before = masters(engine)
            outcome = watch.step(loss=loss.detach())
            moved = not all(torch.equal(before[n], p) for n, p in masters(engine).items())
            assert moved == (step != 4)
            if step != 4:
                near(outcome.record.global_norm, float(engine.get_global_grad_norm()), 1e-5, "global norm")
    equal_on_all_ranks(same(watch.history))
    assert [i.rule for i in watch.incidents] == ["non_finite"]


def loss_scale(form: Form, rank: int, world: int, folder: Path) -> None:
    """Norms are free of DeepSpeed's loss scale, and a step that overflows on one rank is no incident."""
    engine = engine_of(Net(), form, world)
    _, expected = train_in_float64(Net(), batches(world), optimizer=sgd, bad=(3,))
    with Watch(engine, rules="default", on_error="raise", **EVERYTHING) as watch:
        for step, (pair,) in enumerate(batches(world)):
            x, y = (t.to(form.dtype) for t in mine(pair, rank))
            loss = loss_of(engine, (x, y)).float()
            engine.backward(loss * (math.inf if step == 3 and rank == 0 else 1.0))
            outcome = watch.step(loss=loss.detach())
            if step != 3:
                near(outcome.record.global_norm, float(engine.get_global_grad_norm()), 1e-4, "DeepSpeed's norm")
    equal_on_all_ranks(same(watch.history))
    compare(watch.history, expected, rel=5e-3, updates=False, histograms=False, losses=False)
    assert not watch.incidents, watch.incidents
    assert engine.optimizer.loss_scale == 512.0
    assert [r.scalars["amp_overflow"] for r in watch.history] == [0, 0, 0, 1, 0, 0]


def told(form: Form, rank: int, world: int, folder: Path) -> None:
    """What can't be done is said when the watch begins."""
    engine = engine_of(Net(), form._replace(clip=1.0, is_offloaded=True), world)
    with pytest.raises(ConfigError, match="surgery puts gradients together"):
        Watch(engine, surgery="pcgrad")
    for option in ({"autopsy": True}, {"noise_scale": True}):
        with pytest.raises(ConfigError, match="runs backward once more"):
            Watch(engine, **option)
    with pytest.raises(ConfigError, match="a rollback can't take back"):
        Watch(engine, rules=[NonFinite(then=Rollback(steps=5))])
    with pytest.raises(ConfigError, match="leave `optimizer` out"):
        Watch(engine, torch.optim.SGD(Net().parameters(), 0.1))
    assert "step" not in vars(engine.optimizer)
    assert not {"backward", "scale"} & vars(engine).keys()
    with pytest.warns(GradwatchWarning, match="it will clip again by the norm from before"):
        Watch(engine, treatments=ClipByGlobalNorm(1.0)).close()


def pipeline(form: Form, rank: int, world: int, folder: Path) -> None:
    """Ranks that hold other layers would wait for one another for ever: refused when the watch begins."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    stages = deepspeed.pipe.PipelineModule([nn.Linear(4, 4), nn.Linear(4, 1)], num_stages=world, loss_fn=nn.MSELoss())
    engine, _, _, _ = deepspeed.initialize(
        model=stages, optimizer=torch.optim.SGD(stages.parameters(), 0.1), config=settings(form, 1)
    )
    with pytest.raises(ConfigError, match="other layers on each rank"):
        Watch(engine)
    # Of the process, which no engine takes back: those of the cases to come would take it for theirs.
    deepspeed.utils.groups.mpu = None


def by_the_module(form: Form, rank: int, world: int, folder: Path) -> None:
    """Given the module inside and its raw optimizer, gradwatch finds the engine that trains it."""
    engine = engine_of(Net(), form, world, adamw)
    _, expected = train_in_float64(Net(), batches(world), optimizer=adamw)
    raw = getattr(engine.optimizer, "optimizer", engine.optimizer)
    with Watch(engine.module, raw, on_error="raise", **EVERYTHING) as watch:
        for (pair,) in batches(world):
            loss = loss_of(engine, mine(pair, rank))
            engine.backward(loss)
            watch.after_backward(loss=loss.detach())
            engine.step()
            watch.after_step()
    compare(watch.history, expected, rel=1e-5)
    assert not watch.incidents


def by_accelerate(form: Form, rank: int, world: int, folder: Path) -> None:
    deepspeed_doors.in_accelerate(form, settings(form, world), sgd, rank, world)


def by_the_trainer(form: Form, rank: int, world: int, folder: Path) -> None:
    deepspeed_doors.in_trainer(form, settings(form, world), rank, world, folder)


def by_lightning(form: Form, rank: int, world: int, folder: Path) -> None:
    deepspeed_doors.in_lightning(form, settings(form, world), sgd, rank, world, folder)


def in_whole_gradients(form: Form, rank: int, world: int, folder: Path) -> None:
    """Norms are DeepSpeed's own, and a clip acts on what it steps with; what can't be skipped is said."""
    engine = engine_of(Net(), form, world, adamw)
    with pytest.warns(GradwatchWarning, match="ends the run by itself where a gradient is not finite"):
        watch = Watch(engine, treatments=ClipByGlobalNorm(0.05), on_error="raise", **EVERYTHING)
    for parts in batches(world, micro=form.micro):
        for part in parts:
            x, y = (t.to(form.dtype) for t in mine(part, rank))
            loss = loss_of(engine, (x, y)).float()
            engine.backward(loss)
            outcome = watch.step(loss=loss.detach())
        near(outcome.record.global_norm_after, min(0.05, outcome.record.global_norm), 1e-5, "after")
        near(float(engine.get_global_grad_norm()), outcome.record.global_norm_after, 1e-4, "DeepSpeed's norm")
    watch.close()
    assert all(r.treatments[0].applied for r in watch.history)
    equal_on_all_ranks(same(watch.history))
    assert not watch.incidents, watch.incidents


LAWS = {
    "clipped": in_whole_gradients,
    "right-and-neutral": right_and_neutral,
    "treated": treated,
    "collectives": one_sum,
    "healthy": healthy,
    "each-treatment": each_treatment,
    "own-clip": own_clip,
    "mixed-precision": in_bfloat16,
    "loss-scale": loss_scale,
    "told": told,
    "pipeline": pipeline,
    "by-the-module": by_the_module,
    "accelerate": by_accelerate,
    "trainer": by_the_trainer,
    "lightning": by_lightning,
}


def _cases(forms: dict[str, Form], laws: list[str]) -> dict[str, Callable[[int, int, Path], None]]:
    return {f"{name}-{law}": partial(LAWS[law], form) for name, form in forms.items() for law in laws}


CASES = {
    **_cases(WHOLE, ["right-and-neutral", "treated", "by-the-module"]),
    **_cases(FORMS, ["right-and-neutral", "treated"]),
    **_cases(STAGES, ["collectives", "healthy", "each-treatment", "by-the-module"]),
    **_cases({name: STAGES[name] for name in ("zero-2", "zero-3")}, ["told"]),
    **_cases({name: FORMS[name] for name in DOORS}, ["accelerate", "trainer", "lightning"]),
    **_cases({"zero-1": STAGES["zero-1"]}, ["pipeline"]),
    **_cases({"zero-2-offload": FORMS["zero-2-offload"]}, ["each-treatment"]),
    **_cases(CLIPPED, ["own-clip"]),
    **_cases(BFLOAT, ["mixed-precision"]),
    **_cases(HALF, ["loss-scale"]),
    **_cases(IN_FLOAT, ["clipped"]),
}

if __name__ == "__main__":
    # The engine chooses its device before anything else is known of it.
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(CASES)
