"""What ranks run as stages of a pipeline (`torch.distributed.pipelining`), each stage alone or under DDP or FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.treatments import (
    AdaptiveClip,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    EmaClip,
    Noise,
    ResetMoments,
    SkipParameter,
    SkipStep,
    SpikeClip,
)
from tests.modes.ranks import counted, equal_on_all_ranks, main
from tests.modes.reference import (
    EVERYTHING,
    ROWS,
    STEPS,
    batches,
    compare,
    loss_of,
    mine,
    same,
    sgd,
    train_in_float64,
)

DEPTH, WIDTH, PARTS = 4, 12, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.bias, std=0.1)  # an update ratio of what begins at zero says nothing

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Deep(nn.Module):
    """Blocks between an embedding and a head, either of which a stage may lack; an idle layer that no loss uses."""

    def __init__(self, *, idle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed: nn.Module | None = nn.Linear(10, WIDTH)
        self.blocks = nn.ModuleDict({str(i): Block() for i in range(DEPTH)})
        self.head: nn.Module | None = nn.Linear(WIDTH, 1)
        self.idle = nn.Linear(WIDTH, 2) if idle else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def part_of(net: Deep, number: int, count: int) -> Deep:
    """Return one stage of several: the model without what lies in the others, the rest under its own names."""
    each = DEPTH // count
    for i in range(DEPTH):
        if i // each != number:
            del net.blocks[str(i)]
    if number > 0:
        net.embed = None
    if number < count - 1:
        net.head = net.idle = None
    return net


class Form(NamedTuple):
    """One way to run a pipeline.

    Attributes:
        schedule: of torch.
        num_stages: on each rank of the pipeline.
        wrap: makes of a stage what its ranks share, given their mesh; None: every rank of a stage stands alone.
    """

    schedule: type = Schedule1F1B
    num_stages: int = 1
    wrap: str = "ddp"


FORMS = {
    "gpipe": Form(ScheduleGPipe),
    "1f1b": Form(Schedule1F1B),
    "interleaved": Form(ScheduleInterleaved1F1B, num_stages=2),
    "fsdp": Form(Schedule1F1B, wrap="fsdp"),
}


class Run(NamedTuple):
    """A pipeline on this rank.

    Attributes:
        number: of the batches that this rank's pipeline sees.
        at_once: how many pipelines there are.
    """

    schedule: Any
    modules: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    number: int
    at_once: int


def meshes(world: int, num_stages: int = 2) -> DeviceMesh:
    return init_device_mesh("cpu", (world // num_stages, num_stages), mesh_dim_names=("dp", "pp"))


def wrapped(part: nn.Module, form: Form, mesh: DeviceMesh) -> nn.Module:
    if mesh["dp"].size() == 1:
        return part
    if form.wrap == "fsdp":
        for block in part.blocks.values():
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(part, mesh=mesh["dp"])
    return DistributedDataParallel(part, process_group=mesh["dp"].get_group(), find_unused_parameters=True)


def begin(
    form: Form,
    world: int,
    *,
    net: Callable[[], Deep] = Deep,
    optimizer: Any = sgd,
    loss: Any = None,
    num_ranks: int = 2,
) -> Run:
    """Return a pipeline over so many ranks, as many times as there are ranks for it."""
    mesh = meshes(world, num_ranks)
    pp = mesh["pp"]
    place, total = pp.get_local_rank(), pp.size() * form.num_stages
    stages, parts = [], []
    for k in range(form.num_stages):
        index = place + k * pp.size()
        part = wrapped(part_of(net(), index, total), form, mesh)
        parts.append(part)
        stages.append(PipelineStage(part, index, total, torch.device("cpu"), group=pp.get_group()))
    loss = loss or (lambda out, y: (out - y).square().mean())
    held = stages if form.num_stages > 1 else stages[0]
    schedule = form.schedule(held, n_microbatches=PARTS, loss_fn=loss)
    return Run(schedule, parts, [optimizer(part) for part in parts], mesh["dp"].get_local_rank(), mesh["dp"].size())


def one_step(run: Run, pair: tuple[Tensor, Tensor]) -> Tensor | None:
    """Run forward and backward of a batch; return its loss where the last stage is."""
    losses: list[Tensor] = []
    numbers = [stage.stage_index for stage in _stages(run.schedule)]
    has_last = max(numbers) == _stages(run.schedule)[0].num_stages - 1
    given = (pair[0],) if 0 in numbers else ()
    run.schedule.step(*given, **({"target": pair[1], "losses": losses} if has_last else {}))
    return torch.stack(losses).detach().mean() if has_last else None


def _stages(schedule: Any) -> Sequence[Any]:
    return getattr(schedule, "_stages", None) or [schedule._stage]


def fit(
    form: Form,
    rank: int,
    world: int,
    *,
    watched: bool = True,
    steps: int = STEPS,
    bad: dict[int, int] | None = None,
    spikes: dict[int, float] | None = None,
    net: Callable[[], Deep] = Deep,
    optimizer: Any = sgd,
    has_equal_reports: bool = True,
    **options: Any,
) -> tuple[Run, Watch | None]:
    """Train a pipeline, and return it with its watch (closed)."""
    factor = [1.0]
    run = begin(form, world, net=net, optimizer=optimizer, loss=lambda out, y: (out - y).square().mean() * factor[0])
    watch = None
    if watched:
        watch = Watch(
            run.schedule, run.optimizers, **{"rules": "observe", "on_error": "raise", **EVERYTHING, **options}
        )
    for step, (pair,) in enumerate(batches(run.at_once, steps)):
        factor[0] = (spikes or {}).get(step, 1.0) * (math.nan if (bad or {}).get(step) == run.number else 1.0)
        part = mine(pair, run.number)
        loss = one_step(run, part)
        if watch is None:
            for each in run.optimizers:
                each.step()
        else:
            watch.step(loss=loss, batch=part if loss is not None else None)
        for each in run.optimizers:
            each.zero_grad()
    if watch is not None:
        watch.close()
        if has_equal_reports:
            equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
        equal_on_all_ranks(watch.history[0].index.paths)
        assert [r.num_samples for r in watch.history] == [run.at_once * ROWS] * steps, watch.history[0].num_samples
    return run, watch


def weights(run: Run) -> dict[str, Tensor]:
    """Return the parameters that lie on this rank, by their name in the whole model."""
    found = {}
    for part in run.modules:
        for name, p in part.named_parameters():
            found[name.removeprefix("module.")] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return found


def against_reference(
    form: Form, rank: int, world: int, *, reference: Any = None, net: Callable[[], Deep] = Deep, **options: Any
) -> tuple[Run, Watch]:
    twin, expected = train_in_float64(
        net(), batches(world // 2), **{**(reference or {}), "spikes": options.get("spikes")}
    )
    run, watch = fit(form, rank, world, net=net, **options)
    assert watch is not None
    kinds = watch.history[0].index.kinds
    paths = [p for p, kind in zip(watch.history[0].index.paths, kinds, strict=True) if kind == "parameter"]
    assert sorted(paths) == sorted(name for name, _ in twin.named_parameters()), paths
    compare(watch.history, expected, rel=1e-5)
    for name, p in weights(run).items():
        torch.testing.assert_close(p.double(), twin.get_parameter(name), rtol=1e-4, atol=1e-6)
    return run, watch


def gentle(net: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer under which the net does not diverge."""
    return torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9)


def right_and_neutral(form: Form, rank: int, world: int, folder: Path) -> None:
    run, watch = against_reference(form, rank, world, rules="default")
    assert not watch.incidents, watch.incidents
    record = watch.history[0]
    assert record.measured("output_rms")[record.index.position("blocks.0.fc")]
    assert record.measured("row_spread")[record.index.position("blocks.3.fc.weight")]
    unwatched = weights(fit(form, rank, world, watched=False)[0])
    watched = weights(run)
    assert all(torch.equal(watched[name], unwatched[name]) for name in watched)


def treated(form: Form, rank: int, world: int, folder: Path) -> None:
    """A spike is clipped by the same factor on all stages, what is not finite in one pipeline is skipped on all."""
    _, watch = against_reference(
        form,
        rank,
        world,
        reference={"max_norm": 0.5, "bad": (4,)},
        spikes={2: 1000.0},
        bad={4: world // 2 - 1},
        rules=[NonFinite(then=SkipStep())],
        treatments=ClipByGlobalNorm(0.5),
    )
    assert [r.step for r in watch.history if r.skipped] == [4]
    assert watch.history[2].treatments[0].applied
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


def healthy(form: Form, rank: int, world: int, folder: Path) -> None:
    _, watch = fit(form, rank, world, steps=60, rules="autoclip", optimizer=gentle)
    assert watch is not None
    assert not watch.incidents, watch.incidents
    assert not any(t.applied for r in watch.history for t in r.treatments)


def one_sum(form: Form, rank: int, world: int, folder: Path) -> None:
    """With nothing else due a step costs one all-reduce for each way in which the model is cut."""
    run = begin(form, world)
    with Watch(run.schedule, run.optimizers, rules="default", on_error="raise", **dict.fromkeys(EVERYTHING)) as watch:
        for step, (pair,) in enumerate(batches(run.at_once)):
            loss = one_step(run, mine(pair, run.number))
            with counted() as made:
                watch.step(loss=loss)
            for each in run.optimizers:
                each.zero_grad()
            wanted = ["SUM"] * (2 if form.wrap == "fsdp" and run.at_once > 1 else 1)
            assert step == 0 or [op for op, _, _ in made] == wanted, made


def idle(form: Form, rank: int, world: int, folder: Path) -> None:
    """A layer without a gradient is none on record, on every rank."""
    _, watch = against_reference(form, rank, world, net=partial(Deep, idle=True))
    record = watch.history[0]
    assert not record.measured("grad_norm")[record.index.position("idle.weight")]
    assert not record.measured("update_ratio")[record.index.position("idle.weight")]


def each_treatment(form: Form, rank: int, world: int, folder: Path) -> None:
    """What treatments do on stages is what they do to the whole model, in a training of the whole batch."""
    treatments: list[Callable[[], Any]] = [
        lambda: ClipByNorm(0.05),
        lambda: ClipByValue(0.01),
        lambda: AdaptiveClip(0.01),
        lambda: AdaptiveClip(0.01, head=None),
        lambda: Centralize(),
        lambda: EmaClip(warmup=1),
        lambda: SpikeClip(1.5),
        lambda: ResetMoments(every=2),
        lambda: ClipByNorm(0.01, paths="blocks.3.*"),
    ]

    def adam(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), 0.01, eps=1e-4)

    for make in treatments:
        run, watch = fit(form, rank, world, optimizer=adam, treatments=make(), has_equal_reports=False)
        twin = Deep()
        alone = adam(twin)
        with Watch(twin, alone, rules="observe", treatments=make(), on_error="raise") as other:
            for (pair,) in batches(run.at_once):
                loss = loss_of(twin, pair)
                loss.backward()
                other.step(loss=loss)
                alone.zero_grad()
        assert watch is not None
        done = [any(t.applied for t in r.treatments) for r in other.history]
        assert any(done), make()
        for name, p in weights(run).items():
            torch.testing.assert_close(p, twin.get_parameter(name).detach(), rtol=1e-4, atol=2e-6)


def others(form: Form, rank: int, world: int, folder: Path) -> None:
    """Noise is the same on copies of a stage; a parameter that is not finite is skipped where it lies."""
    run, _ = fit(form, rank, world, treatments=Noise(0.1))
    copies: list[Any] = [None] * world
    dist.all_gather_object(copies, {name: p.tolist() for name, p in weights(run).items()})
    for other in copies:
        assert all(p.tolist() == other[name] for name, p in weights(run).items() if name in other)
    _, watch = fit(form, rank, world, bad={2: 0}, rules="observe", treatments=SkipParameter())
    assert watch is not None
    assert all(math.isfinite(r.global_norm) for r in watch.history if r.step != 2)


def same_names(form: Form, rank: int, world: int, folder: Path) -> None:
    """Stages whose own names collide are told apart by their number."""
    mesh = meshes(world)
    pp = mesh["pp"]
    place = pp.get_local_rank()
    torch.manual_seed(place)
    part = nn.Sequential(nn.Linear(10, 10), nn.Tanh()) if place == 0 else nn.Sequential(nn.Linear(10, 1))
    stage = PipelineStage(part, place, 2, torch.device("cpu"), group=pp.get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, y: (out - y).square().mean())
    optimizer = sgd(part)
    with Watch(schedule, optimizer, on_error="raise", **EVERYTHING) as watch:
        x = torch.randn(4, 10)
        losses: list[Tensor] = []
        schedule.step(*((x,) if place == 0 else ()), **({"target": x[:, :1], "losses": losses} if place else {}))
        watch.step(loss=sum(losses) / 2 if losses else None)
    record = watch.history[0]
    weights = [p for p, k in zip(record.index.paths, record.index.kinds, strict=True) if k == "parameter"]
    assert weights == ["stages.0.0.weight", "stages.0.0.bias", "stages.1.0.weight", "stages.1.0.bias"], weights
    assert record.measured("grad_norm")[:4].all()


LAWS = {
    "right-and-neutral": right_and_neutral,
    "treated": treated,
    "healthy": healthy,
    "collectives": one_sum,
    "idle": idle,
    "each-treatment": each_treatment,
    "others": others,
    "same-names": same_names,
}
TWO = {f"{form}-{law}": partial(LAWS[law], FORMS[form]) for form in ("1f1b",) for law in LAWS}
TWO |= {
    f"{form}-{law}": partial(LAWS[law], FORMS[form])
    for form in ("gpipe", "interleaved")
    for law in ("right-and-neutral", "treated")
}
FOUR = {
    f"{form}-{law}": partial(LAWS[law], FORMS[form])
    for form in ("gpipe", "1f1b", "interleaved", "fsdp")
    for law in ("right-and-neutral", "treated", "healthy", "collectives")
}
CASES = {**{f"two-{name}": case for name, case in TWO.items()}, **{f"four-{n}": case for n, case in FOUR.items()}}

if __name__ == "__main__":
    main({**TWO, **FOUR})
