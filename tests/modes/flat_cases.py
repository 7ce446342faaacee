"""What ranks run under FSDP1: flat parameters, whole in the model or as views, in every strategy that a CPU can run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

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
    SkipStep,
    SpikeClip,
)
from tests.modes import rollback_cases
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
    sgd,
    train_in_float64,
)


class Form(NamedTuple):
    """One way to wrap a model.

    Attributes:
        uses_views: `use_orig_params=True`.
        is_nested: every layer is wrapped, and the whole.
        is_checkpointed: activations are computed again.
        strategy: of sharding.
        micro: micro-batches; all but the last under `no_sync`.
        tied: two layers share a weight.
        mixed: computes in bfloat16.
    """

    uses_views: bool
    is_nested: bool = True
    is_checkpointed: bool = False
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    micro: int = 1
    tied: bool = False
    mixed: bool = False


GRAD_OP, WHOLE, HYBRID = (
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)
FORMS = {
    "views": Form(True),
    "flat": Form(False),
    "views-in-one": Form(True, is_nested=False, tied=True),
    "flat-in-one": Form(False, is_nested=False, tied=True),
    "views-shard-grad-op": Form(True, strategy=GRAD_OP),
    "flat-shard-grad-op": Form(False, strategy=GRAD_OP),
    "views-no-shard": Form(True, strategy=WHOLE),
    "flat-no-shard": Form(False, strategy=WHOLE),
    "views-no-sync": Form(True, micro=2),
    "flat-no-sync": Form(False, micro=2),
    "views-checkpointed": Form(True, is_checkpointed=True),
    "flat-checkpointed": Form(False, is_checkpointed=True),
}
HYBRIDS = {"views-hybrid": Form(True, strategy=HYBRID), "flat-hybrid": Form(False, strategy=HYBRID)}
MIXED = {"views-bfloat16": Form(True, mixed=True), "flat-bfloat16": Form(False, mixed=True)}


def wrapped(net: nn.Module, form: Form, **more: Any) -> FSDP:
    mesh = None
    if form.strategy is HYBRID:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if form.mixed else None
    model = FSDP(
        net,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}) if form.is_nested else None,
        use_orig_params=form.uses_views,
        sharding_strategy=form.strategy,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        mixed_precision=mixed,
        **more,
    )
    if form.is_checkpointed:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return model


def fit(
    form: Form,
    rank: int,
    world: int,
    *,
    watched: bool = True,
    bad: dict[int, int] | None = None,
    spikes: dict[int, float] | None = None,
    steps: int = STEPS,
    net: type[Net] = Net,
    **options: Any,
) -> tuple[FSDP, Watch | None]:
    """Wrap a model, train it, and return it with its watch (closed)."""
    model = wrapped(net(tied=True) if form.tied else net(), form)
    optimizer = sgd(model)
    watch = None
    if watched:
        watch = Watch(model, optimizer, **{"rules": "observe", "on_error": "raise", **EVERYTHING, **options})
    for step, parts in enumerate(batches(world, steps, form.micro)):
        optimizer.zero_grad()
        losses = []
        for i, part in enumerate(parts):
            syncs = contextlib.nullcontext() if i == form.micro - 1 else model.no_sync()
            with syncs:
                loss = loss_of(model, mine(part, rank)) * (spikes or {}).get(step, 1.0)
                if (bad or {}).get(step) == rank:
                    loss = loss * math.nan
                (loss / form.micro).backward()
            losses.append(float(loss.detach()))
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=sum(losses) / len(losses), batch=mine(parts[-1], rank))
    if watch is not None:
        watch.close()
        equal_on_all_ranks(same(watch.history))
        equal_on_all_ranks([str(i) for i in watch.incidents])
        assert [r.num_samples for r in watch.history] == [world * ROWS] * steps
    return model, watch


def weights(model: FSDP) -> dict[str, Tensor]:
    with FSDP.summon_full_params(model):
        found = {n.replace("_checkpoint_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
        return {n.replace("_fsdp_wrapped_module.", ""): p for n, p in found.items()}


def against_reference(
    form: Form, rank: int, world: int, *, reference: Any = None, **options: Any
) -> tuple[Watch, dict[str, Tensor]]:
    twin, expected = train_in_float64(
        Net(tied=form.tied), batches(world, micro=form.micro), **{**(reference or {}), "spikes": options.get("spikes")}
    )
    model, watch = fit(form, rank, world, **options)
    assert watch is not None
    parameters = [
        p
        for p, kind in zip(watch.history[0].index.paths, watch.history[0].index.kinds, strict=True)
        if kind == "parameter"
    ]
    assert parameters == [name for name, _ in twin.named_parameters()], parameters
    compare(watch.history, expected, rel=1e-5)
    found = weights(model)
    for name, q in twin.named_parameters():
        torch.testing.assert_close(found[name].double(), q, rtol=1e-4, atol=1e-6)
    return watch, found


def right_and_neutral(form: Form, rank: int, world: int, folder: Path) -> None:
    watch, watched = against_reference(form, rank, world, rules="default")
    assert not watch.incidents, watch.incidents
    unwatched = weights(fit(form, rank, world, watched=False)[0])
    assert all(torch.equal(watched[name], unwatched[name]) for name in watched)


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
    never = dict.fromkeys(EVERYTHING)
    model = wrapped(Net(tied=form.tied), form)
    optimizer = sgd(model)
    with Watch(model, optimizer, rules="default", on_error="raise", **never) as watch:
        for step, (pair,) in enumerate(batches(world)):
            loss = loss_of(model, mine(pair, rank))
            loss.backward()
            with counted() as made:
                watch.step(loss=loss)
            optimizer.zero_grad()
            assert step == 0 or [op for op, _, _ in made] == ["SUM"], made


def healthy(form: Form, rank: int, world: int, folder: Path) -> None:
    _, watch = fit(form, rank, world, steps=60, rules="autoclip")
    assert watch is not None
    assert not watch.incidents, watch.incidents
    assert not any(t.applied for r in watch.history for t in r.treatments)


def each_treatment(form: Form, rank: int, world: int, folder: Path) -> None:
    """What treatments do to pieces is what they do to whole gradients, in a training of the whole batch."""
    treatments: list[Callable[[], Any]] = [
        lambda: ClipByNorm(0.05),
        lambda: ClipByValue(0.01),
        lambda: AdaptiveClip(0.01),
        lambda: AdaptiveClip(0.01, head=None),
        lambda: Centralize(),
        lambda: EmaClip(warmup=1),
        lambda: SpikeClip(1.5),
        lambda: ResetMoments(every=2),
    ]
    for make in treatments:
        twin = Net()
        for model, share in ((wrapped(Net(), form), rank), (twin, None)):
            optimizer = torch.optim.AdamW(model.parameters(), 0.01, eps=1e-4)
            with Watch(model, optimizer, rules="observe", treatments=make(), on_error="raise") as watch:
                for (pair,) in batches(world):
                    loss = loss_of(model, pair if share is None else mine(pair, share))
                    loss.backward()
                    watch.step(loss=loss)
                    optimizer.zero_grad()
            assert any(t.applied for r in watch.history for t in r.treatments), make()
            if share is not None:
                found = weights(model)
        for name, q in twin.named_parameters():
            torch.testing.assert_close(found[name], q.detach(), rtol=1e-4, atol=2e-6)


class Sometimes(Net):
    """A gate of one element, which one rank alone can hold, is used at every other step; an idle layer never."""

    def __init__(self) -> None:
        super().__init__(idle=True)
        self.gate = nn.Linear(1, 1, bias=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found = super().forward(x)
        return self.gate(found) if self.calls % 2 else found


def present(form: Form, rank: int, world: int, folder: Path) -> None:
    """A gradient that no rank has is none on record, on every rank."""
    twin, expected = train_in_float64(Sometimes(), batches(world))
    assert {"gate.weight" in e.norms for e in expected} == {True, False}
    model, watch = fit(form, rank, world, net=Sometimes)
    assert watch is not None
    for record, want in zip(watch.history, expected, strict=True):
        shown = record.measured("grad_norm") & record.index.is_parameter
        assert {record.index.paths[i] for i in shown.nonzero()[0]} == set(want.norms) == set(record.histograms)
        assert (record.measured("update_ratio") == shown).all()
    compare(watch.history, expected, rel=1e-5)
    found = weights(model)
    for name, q in twin.named_parameters():
        torch.testing.assert_close(found[name].double(), q, rtol=1e-4, atol=1e-6)


def goes_back(form: Form, rank: int, world: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = wrapped(rollback_cases.Net(), form)
    watch, states = rollback_cases.train(model, model, rank)
    details = dict(watch.incidents[0].details)
    equal_on_all_ranks(details)
    assert (details["rolled_back_from"], details["rolled_back_to"]) == (25, 10), details
    assert all(map(torch.equal, states[26], states[10]))
    assert not all(map(torch.equal, states[27], states[11]))


def loss_scale(form: Form, rank: int, world: int, folder: Path) -> None:
    """Norms are free of the scale of FSDP's own scaler, and a step that overflows on one rank is no incident."""
    scaler = ShardedGradScaler(device="cpu", init_scale=1024.0, growth_interval=1000)
    model = wrapped(Net(), form)
    optimizer = sgd(model)
    _, expected = train_in_float64(Net(), batches(world), bad=(3,))
    with Watch(model, optimizer, rules="default", scaler=scaler, on_error="raise", **EVERYTHING) as watch:
        for step, (pair,) in enumerate(batches(world)):
            loss = loss_of(model, mine(pair, rank))
            scaler.scale(loss * (math.inf if step == 3 and rank == 0 else 1.0)).backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    equal_on_all_ranks(same(watch.history))
    compare(watch.history, expected, rel=1e-5)
    assert not watch.incidents, watch.incidents
    assert scaler.get_scale() == 512.0


def in_bfloat16(form: Form, rank: int, world: int, folder: Path) -> None:
    """The norm of the whole is torch's own of the same gradients."""
    model = wrapped(Net(), form)
    optimizer = sgd(model)
    with Watch(model, optimizer, rules="default", on_error="raise", **EVERYTHING) as watch:
        for (pair,) in batches(world):
            loss = loss_of(model, mine(pair, rank)).float()
            loss.backward()
            norm = float(model.clip_grad_norm_(math.inf))
            outcome = watch.step(loss=loss)
            near(outcome.record.global_norm, norm, 1e-5, "global norm")
            optimizer.zero_grad()
    assert not watch.incidents, watch.incidents


def noise(form: Form, rank: int, world: int, folder: Path) -> None:
    """Copies of a piece get the same noise, and other pieces another."""
    model, _ = fit(form, rank, world, treatments=Noise(0.1))
    equal_on_all_ranks([p.tolist() for p in weights(model).values()])


def in_lightning(form: Form, rank: int, world: int, folder: Path) -> None:
    # Here, since it takes seconds, and those who only wrap a model have no use for it.
    from pytorch_lightning.strategies import DDPStrategy

    from tests.modes.lightning_cases import Module, loader, quiet, trainer

    class Wrapped(DDPStrategy):
        """Does on a CPU what Lightning's own strategy, which refuses one, does: wraps the module whole, ahead of its
        optimizer."""

        def _setup_model(self, model: nn.Module) -> FSDP:
            return wrapped(model, form)

    data = batches(world)
    _, expected = train_in_float64(Net(), data, bad=(3,))
    for want in expected:
        for table in (want.norms, want.histograms, want.ratios):
            for name in list(table):
                table[f"net.{name}"] = table.pop(name)
    watch = quiet(**EVERYTHING, rules="autoclip")
    run = trainer(folder, watch, strategy=Wrapped(process_group_backend="gloo"))
    run.fit(Module(Net(), rank, {3: 1}), loader(data, rank))
    compare(watch.history, expected, rel=1e-5)
    equal_on_all_ranks(same(watch.history))
    (incident,) = watch.incidents
    assert (incident.rule, incident.treatments) == ("non_finite", ("skip_step",))


LAWS = {
    "lightning": in_lightning,
    "right-and-neutral": right_and_neutral,
    "treated": treated,
    "collectives": one_sum,
    "healthy": healthy,
    "each-treatment": each_treatment,
    "present": present,
    "goes-back": goes_back,
    "loss-scale": loss_scale,
    "mixed-precision": in_bfloat16,
    "noise": noise,
}


def _cases(forms: dict[str, Form], laws: list[str]) -> dict[str, Callable[[int, int, Path], None]]:
    return {f"{name}-{law}": partial(LAWS[law], form) for name, form in forms.items() for law in laws}


_BOTH = {name: FORMS[name] for name in ("views", "flat")}
TWO = {
    **_cases(FORMS, ["right-and-neutral", "treated"]),
    **_cases(_BOTH, ["collectives", "healthy", "each-treatment", "present", "goes-back", "loss-scale"]),
    **_cases(MIXED, ["mixed-precision"]),
    **_cases({name: FORMS[name] for name in ("views", "views-in-one")}, ["lightning"]),
}
FOUR = _cases(HYBRIDS, ["right-and-neutral", "treated", "collectives", "noise"])
CASES = {**TWO, **FOUR}

if __name__ == "__main__":
    main(CASES)
