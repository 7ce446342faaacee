"""Modes of training in one process: norms against float64, weights against the unwatched run."""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch import Watch
from tests.modes.reference import EVERYTHING, ROWS, STEPS, Net, batches, compare, loss_of, sgd, train_in_float64

STRICT = {"rules": "observe", "on_error": "raise", **EVERYTHING}


class Checkpointed(Net):
    """Recomputes the middle layers in backward."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.body:
            x = torch.relu(checkpoint(layer, x, use_reentrant=self.use_reentrant))
        return self.last(x)


def train(net: nn.Module, *, watched: bool, forward: Callable[..., Any] | None = None, micro: int = 1, **options: Any):
    """Train plainly and return the watch and everything that must not differ."""
    optimizer = options.pop("optimizer", sgd)(net)
    model = net if forward is None else forward
    watch = Watch(net, optimizer, **{**STRICT, **options}) if watched else None
    losses = []
    for parts in batches(1, STEPS, micro):
        total = torch.zeros(())
        for pair in parts:
            loss = loss_of(model, pair) / len(parts)
            loss.backward()
            total += loss.detach()
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=total)
        optimizer.zero_grad()
        losses.append(total)
    if watch is not None:
        watch.close()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return watch, [*losses, *state, *net.parameters(), *net.buffers(), torch.get_rng_state()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Net, id="plain"),
        pytest.param(lambda: Net(tied=True), id="tied-weights"),
        pytest.param(lambda: Checkpointed(use_reentrant=True), id="checkpointing-reentrant"),
        pytest.param(lambda: Checkpointed(use_reentrant=False), id="checkpointing-non-reentrant"),
    ],
)
@pytest.mark.parametrize("micro", [1, 3], ids=["", "accumulated"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_numbers_are_right_and_nothing_changes(make: Callable[[], nn.Module], micro: int) -> None:
    net = make()
    _, expected = train_in_float64(net, batches(1, STEPS, micro))
    watch, seen = train(net, watched=True, micro=micro)
    compare(watch.history, expected)
    assert equal(seen, train(make(), watched=False, micro=micro)[1])


def compiled(net: nn.Module, counter: list[int]) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        counter.append(len(graph.graph.nodes))
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(net, backend=backend)


def test_compiled_models_keep_their_frames_and_give_right_parameter_numbers() -> None:
    frames: dict[bool, list[int]] = {True: [], False: []}
    values = {}
    for watched in (True, False):
        torch._dynamo.utils.counters.clear()
        net = Net()
        forward = compiled(net, frames[watched])
        watch, values[watched] = train(net, watched=watched, forward=forward, activations_every=None)
        assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
        if watched:
            compare(watch.history, train_in_float64(Net(), batches(1))[1])
    assert frames[True] == frames[False]
    assert len(frames[True]) == 1
    assert equal(values[True], values[False])


def test_modules_compiled_before_watching_are_said_not_to_be_seen() -> None:
    net = Net()
    frames: list[int] = []
    forward = compiled(net, frames)
    forward(batches(1)[0][0][0])
    with Watch(forward, sgd(net), **STRICT) as watch:
        loss_of(forward, batches(1)[0][0]).backward()
        watch.step()
        record = watch.history[0] if watch.history else None
        notes = " ".join(watch.session.notes)
    record = record or watch.history[0]
    assert "output_rms" not in record.columns
    assert "the model is compiled: what hooks on modules should measure is not seen there" in notes
    assert record.measured("grad_norm").sum() == len(list(net.parameters()))


@pytest.mark.slow
def test_a_compiled_optimizer_step_is_the_same_watched() -> None:
    def run(watched: bool) -> list[Tensor]:
        torch._dynamo.reset()
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        step = torch.compile(optimizer.step, backend="eager")
        watch = Watch(net, optimizer, **STRICT) if watched else None
        for (pair,) in batches(1):
            loss_of(net, pair).backward()
            if watch is not None:
                watch.after_backward()
            step()
            if watch is not None:
                watch.after_step()
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
            assert len(watch.history) == STEPS
        return list(net.parameters())

    assert equal(run(True), run(False))


def test_bf16_parameters_are_measured_in_wider_sums() -> None:
    net = Net().bfloat16()
    watch = Watch(net, sgd(net), **STRICT)
    norms = []
    for (pair,) in batches(1):
        loss_of(net, tuple(t.bfloat16() for t in pair)).backward()
        norms.append({n: float(p.grad.double().norm()) for n, p in net.named_parameters()})
        watch.step()
        net.zero_grad()
    watch.close()
    for record, want in zip(watch.history, norms, strict=True):
        for path, norm in want.items():
            assert record["grad_norm", path] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_overflow_under_a_grad_scaler_is_no_non_finite_incident(fused: bool) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    watch = Watch(net, optimizer, scaler=scaler, on_error="raise", **EVERYTHING)
    for step, (pair,) in enumerate(batches(1)):
        loss = loss_of(net, pair)
        scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
    watch.close()
    assert [r.scalars["amp_overflow"] for r in watch.history] == [float(s == 2) for s in range(STEPS)]
    assert [i.rule for i in watch.incidents if i.rule == "non_finite"] == []
    reference, _ = copy.deepcopy(Net()), None
    loss_of(reference.double(), tuple(t.double() for t in batches(1)[0][0])).backward()
    for name, p in reference.named_parameters():
        assert watch.history[0]["grad_norm", name] == pytest.approx(float(p.grad.norm()), rel=1e-5)


def test_detached_loops_are_measured_step_by_step() -> None:
    torch.manual_seed(0)
    cell, head = nn.GRUCell(4, 8), nn.Linear(8, 1)
    net = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = sgd(net)
    watch = Watch(net, optimizer, **STRICT)
    state, norms = torch.zeros(5, 8), []
    for chunk in torch.randn(6, 3, 5, 4):
        state = state.detach()
        for x in chunk:
            state = cell(x, state)
        head(state).square().mean().backward()
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters())))
        watch.step()
        optimizer.zero_grad()
    watch.close()
    assert [r.global_norm for r in watch.history] == pytest.approx(norms, rel=1e-5)


def test_unfreezing_and_replacing_parameters_in_mid_run() -> None:
    net = Net()
    net.first.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    watch = Watch(net, optimizer, **STRICT)
    for step, (pair,) in enumerate(batches(1)):
        if step == 2:
            net.first.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.first.parameters())})
        if step == 4:
            old, net.last = net.last, nn.Linear(16, 1)
            gone = {id(p) for p in old.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gone]
            optimizer.add_param_group({"params": list(net.last.parameters())})
        loss_of(net, pair).backward()
        norm = {n: float(p.grad.norm()) for n, p in net.named_parameters() if p.grad is not None}
        record = watch.step().record
        for path, want in norm.items():
            assert record["grad_norm", path] == pytest.approx(want, rel=1e-5)
        optimizer.zero_grad()
    watch.close()
    assert [r.scalars["num_trainable"] for r in watch.history] == [6, 6, 8, 8, 8, 8]


def test_detect_anomaly_changes_nothing() -> None:
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        _, seen = train(Net(), watched=True)
    assert equal(seen, train(Net(), watched=False)[1])


def test_averaged_models_stay_silent_and_equal() -> None:
    def run(watched: bool) -> list[Tensor]:
        net = Net()
        optimizer = sgd(net)
        watch = Watch(net, optimizer, local_norms=True, **STRICT) if watched else None
        average = torch.optim.swa_utils.AveragedModel(net)
        for (pair,) in batches(1):
            loss_of(net, pair).backward()
            watch.step() if watch is not None else optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
            average(pair[0])
        if watch is not None:
            watch.close()
            for record in watch.history:
                assert record.scalars["local_norm/0"] == pytest.approx(record.global_norm, rel=1e-6)
        return [*net.parameters(), *average.parameters()]

    assert equal(run(True), run(False))


@pytest.mark.slow
def test_five_thousand_parameters() -> None:
    net = nn.ParameterList([nn.Parameter(torch.full((3,), float(i % 7))) for i in range(5000)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Watch(net, optimizer, **STRICT) as watch:
        torch.stack([p.square().sum() for p in net]).sum().backward()
        watch.step()
    want = math.sqrt(sum(3 * (2 * (i % 7)) ** 2 for i in range(5000)))
    assert watch.history[0].global_norm == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("value", [None, math.nan, math.inf], ids=["no-gradient", "nan", "inf"])
def test_no_gradient_at_all_and_nothing_but_nan(value: float | None) -> None:
    net = Net()
    optimizer = sgd(net)
    before = [p.detach().clone() for p in net.parameters()]
    with Watch(net, optimizer, rules="autoclip", on_error="raise", **EVERYTHING) as watch:
        for _ in range(3):
            for p in net.parameters():
                p.grad = None if value is None else torch.full_like(p, value)
            watch.step(loss=1.0)
    assert equal(before, list(net.parameters()))
    assert len(watch.history) == 3
    assert [r.skipped for r in watch.history] == [value is not None] * 3


def test_a_model_without_parameters_of_its_own() -> None:
    other = nn.Parameter(torch.ones(3))
    with Watch(nn.ReLU(), torch.optim.SGD([other], lr=0.1), **STRICT) as watch:
        other.square().sum().backward()
        watch.step()
    assert watch.history[0].global_norm == pytest.approx(math.sqrt(12))


def test_samples_are_counted_from_the_batch() -> None:
    net = Net()
    with Watch(net, sgd(net), **STRICT) as watch:
        (pair,) = batches(1)[0]
        loss_of(net, pair).backward()
        watch.step(batch=pair)
    assert watch.history[0].num_samples == ROWS


def whole_step(net: nn.Module, optimizer: torch.optim.Optimizer, compiled: str) -> tuple[Callable[..., Any], Any]:
    """Return the loss of a batch and the optimizer's step, with one part of the training compiled by inductor."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(net) if compiled == "model" else net
    loss = torch.compile(loss_of) if compiled == "model-and-loss" else loss_of
    step = torch.compile(optimizer.step) if compiled == "optimizer" else optimizer.step
    return lambda pair: loss(model, pair), step


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("part", ["model", "model-and-loss", "optimizer"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_inductor_compiles_is_the_same_watched_and_its_numbers_are_the_eager_ones(part: str) -> None:
    def run(watched: bool) -> tuple[list[Tensor], dict[str, int], list[Any]]:
        net = Net()
        optimizer = sgd(net)
        loss_on, step = whole_step(net, optimizer, part)
        watch = Watch(net, optimizer, **{**STRICT, "activations_every": None}) if watched else None
        losses = []
        for (pair,) in batches(1):
            loss = loss_on(pair)
            loss.backward()
            if watch is not None:
                watch.after_backward(loss)
            step()
            if watch is not None:
                watch.after_step()
            optimizer.zero_grad()
            losses.append(loss.detach().clone())
        if watch is not None:
            watch.close()
        counters = torch._dynamo.utils.counters
        made = {name: sum(counters[name].values()) for name in ("frames", "graph_break", "recompiles")}
        made |= counters["stats"]
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*losses, *state, *net.parameters()], made, [] if watch is None else watch.history

    bare, frames, _ = run(watched=False)
    seen, frames_watched, history = run(watched=True)
    torch._dynamo.reset()
    assert equal(bare, seen)
    assert frames["unique_graphs"] > 0
    assert frames_watched["graph_break"] == 0
    if part == "optimizer":
        # A step with hooks is entered another way, by torch's own wrapper; what is compiled of it is the same.
        frames, frames_watched = (
            {k: f[k] for k in ("unique_graphs", "calls_captured")} for f in (frames, frames_watched)
        )
    assert frames_watched == frames
    compare(history, train_in_float64(Net(), batches(1))[1])
    eager, _ = train(Net(), watched=True, activations_every=None)
    for ours, theirs in zip(history, eager.history, strict=True):
        for path in theirs.index.paths:
            if theirs.measured("grad_norm")[theirs.index.position(path)]:
                assert ours["grad_norm", path] == pytest.approx(theirs["grad_norm", path], rel=1e-5, abs=1e-8)
