"""Watching changes nothing: weights, optimizer state and random state equal those of the unwatched run, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from tests.zoo import Case, zoo

EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1}
CASES = [pytest.param(case, id=case.id) for case in zoo() if case.has_grad]


def train(case: Case, watched: bool, steps: int = 3, **options: Any) -> tuple[nn.Module, list[Tensor], Tensor]:
    model, args, kwargs = case.make()
    torch.manual_seed(7)
    model(*args, **kwargs)  # lazy parameters take shape
    params = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    losses = []
    watch = Watch(model, optimizer, on_error="raise", **EVERYTHING, **options) if watched else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case.loss(model(*args, **kwargs))
        loss.backward()
        losses.append(loss.detach().clone())
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=loss)
    if watch is not None:
        watch.close()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return model, [*losses, *state, *model.parameters(), *model.buffers()], torch.get_rng_state()


@pytest.mark.parametrize("case", CASES)
def test_watched_training_equals_unwatched_training_bit_for_bit(case: Case) -> None:
    bare, bare_values, bare_rng = train(case, watched=False)
    model, values, rng = train(case, watched=True)
    assert len(values) == len(bare_values)
    for a, b in zip(values, bare_values, strict=True):
        assert torch.equal(plain(a), plain(b))
    assert torch.equal(rng, bare_rng)
    assert hooks_of(model) == hooks_of(bare)
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in bare.modules()]


def plain(value: Tensor) -> Tensor:
    value = value.detach().to_dense() if value.is_sparse else value.detach()
    return torch.nan_to_num(value)


def hooks_of(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = [sum(len(getattr(m, kind)) for kind in kinds) for m in model.modules()]
    return counts + [len(p._backward_hooks or ()) for p in model.parameters()]


def test_users_hooks_and_weight_norm_survive_a_watch() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].weight.register_hook(lambda grad: calls.append("grad"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, **EVERYTHING) as watch:
        model(torch.ones(2, 4)).sum().backward()
        watch.step()
    calls.clear()
    model(torch.ones(2, 4)).sum().backward()
    assert calls == ["forward", "grad"]
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")


def test_an_exception_in_the_loop_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted() -> None:
        with Watch(model, optimizer, **EVERYTHING):
            model(torch.ones(2, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sum(hooks_of(model)) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_copies_of_a_watched_model_and_optimizer_are_inert() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Watch(model, optimizer, **EVERYTHING) as watch:
        twin = copy.deepcopy(model)
        twin(torch.ones(2, 4)).sum().backward()
        torch.optim.swa_utils.AveragedModel(model)(torch.ones(2, 4))
        copy.deepcopy(optimizer)
        model(torch.ones(2, 4)).sum().backward()
        record = watch.step().record
    assert record is not None
    assert record["output_rms", "1"] == pytest.approx(float(model[1].weight.new_tensor(record["output_rms", "1"])))
    assert watch.history[0].index.paths == record.index.paths


def test_validation_between_steps_leaves_no_trace_in_the_records() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(16, 4)
    outputs = []
    with Watch(model, optimizer, **EVERYTHING) as watch:
        for validates in (False, True):
            if validates:
                model.eval()
                model(1e6 * x)
                model.train()
            model(x).sum().backward()
            record = watch.step().record
            optimizer.zero_grad()
            assert record is not None
            outputs.append(record["output_absmax", "0"])
    assert outputs[0] == outputs[1]


def traced(model: nn.Module, x: Tensor) -> list[str]:
    graph = torch.jit.trace(model, x, check_trace=False).inlined_graph
    return [node.kind() for node in graph.nodes()]


def symbolic(model: nn.Module, x: Tensor) -> list[str]:
    return [f"{node.op} {node.target}" for node in torch.fx.symbolic_trace(model).graph.nodes]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("program_of", [traced, symbolic])
def test_what_is_traced_out_of_a_watched_model_in_training_is_the_users_program_alone(program_of: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2))), torch.ones(3, 4)
    expected = program_of(model, x)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), autopsy=True, on_error="raise", **EVERYTHING) as watch:
        for _ in range(2):
            assert program_of(model, x) == expected
            loss = model(x).square().mean()
            loss.backward()
            watch.step(loss=loss, batch=x)
    assert watch.history[1].measured("output_rms").any()
