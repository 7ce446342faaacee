"""After `what_if` all is what it was, bit for bit and object for object, however it ends."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch.trials import CHANGES, Change


class Net(nn.Module):
    """With what can leak: dropout, running statistics, a counter in a list, a recurrent layer, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.recurrent, self.drop = nn.LSTM(8, 8, batch_first=True), nn.Dropout(0.3)
        self.head = nn.Linear(8, 8)
        self.again = self.head
        self.calls: list[int] = []
        self.kept = {"last": torch.zeros(3), "all": [torch.ones(2)]}
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        self.calls.append(len(x))
        self.kept["last"].add_(1)
        h = self.norm(self.embed(x)).unsqueeze(1)
        h = self.drop(self.recurrent(h)[0][:, 0]) * self.frozen
        return self.again(self.head(h))[:, :3]


def batches(count=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(count)]


def training():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for x, y in batches(3):
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.embed.eval()
    return net, optimizer, schedule


def state(net, optimizer):
    """All of it, as plain values and copies."""
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    return {
        "tensors": {n: (id(t), t._version, t.requires_grad, t.detach().clone()) for n, t in named},
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in net.named_parameters()},
        "attributes": {n: {k: id(v) for k, v in vars(m).items()} for n, m in net.named_modules()},
        "modes": [m.training for m in net.modules()],
        "kept": (list(net.calls), net.kept["last"].clone(), net.kept["all"][0].clone()),
        "optimizer": [(id(p), {k: v.clone() for k, v in s.items()}) for p, s in optimizer.state.items()],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "steps": (vars(optimizer).get("_opt_called"), len(optimizer._optimizer_step_post_hooks)),
        "random": [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def unchanged():
    """A training, and a check that it is what it was."""
    net, optimizer, schedule = training()
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    fired = []
    net.head.weight.register_hook(fired.append)
    before = state(net, optimizer)
    yield net, optimizer
    after = state(net, optimizer)
    for part, value in before.items():
        assert same(value, after[part]), part
    assert not steps
    assert not fired
    assert schedule.last_epoch == 3


def test_nothing_is_left_of_all_changes(unchanged) -> None:
    net, optimizer = unchanged
    given = batches()
    copies = [(x.clone(), y.clone()) for x, y in given]
    found = gradwatch.what_if(net, optimizer, F.cross_entropy, given, steps=2)
    assert len(found.tried) > 8
    assert not any(why.startswith("it failed") for why in found.not_tried.values()), found.not_tried
    assert same(copies, given)


class Raises(Change):
    name = "raises"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def apply(self, trial) -> None:
        with torch.no_grad():
            trial.model.embed.weight.fill_(9)
        trial.model.embed.bias.requires_grad_(False)
        trial.before_step.append(self._raise)

    def _raise(self, step: int) -> None:
        random.random()
        torch.randn(3)
        raise self.error


def test_nothing_is_left_after_ctrl_c_in_the_middle_of_a_step(unchanged) -> None:
    net, optimizer = unchanged
    with pytest.raises(KeyboardInterrupt):
        gradwatch.what_if(net, optimizer, F.cross_entropy, batches(), steps=2, changes=[Raises(KeyboardInterrupt())])


def test_a_change_that_fails_is_told_and_nothing_is_left(unchanged) -> None:
    net, optimizer = unchanged
    changes = [Raises(ZeroDivisionError("by zero")), "learning rate / 10"]
    found = gradwatch.what_if(net, optimizer, F.cross_entropy, batches(), steps=2, changes=changes)
    assert found.not_tried == {"raises": "it failed: ZeroDivisionError: by zero"}
    assert [each.name for each in found.tried] == ["learning rate / 10"]


def test_a_loss_that_fails_is_an_error_and_nothing_is_left(unchanged) -> None:
    net, optimizer = unchanged

    def loss_fn(outputs, targets):
        raise RuntimeError("no loss today")

    with pytest.raises(gradwatch.ConfigError, match="the training as it is fails: RuntimeError: no loss today"):
        gradwatch.what_if(net, optimizer, loss_fn, batches(), steps=2)


def test_a_penalty_that_holds_the_weights_itself_counts_and_leaves_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    weights, given = [net[0].weight, net[2].weight], batches(6)
    net[0].weight.grad = kept = torch.ones(8, 6)

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.1 * torch.stack([w.square().sum() for w in weights]).sum()

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 0.1)
        optimizer.step()
        return loss

    changes = ["learning rate / 10"]
    plain = gradwatch.what_if(net, optimizer, loss_fn, given, steps=4, changes=changes).control.losses
    own = gradwatch.what_if(
        net, optimizer, loss_fn, given, steps=4, changes=changes, train_step=train_step
    ).control.losses
    assert net[0].weight.grad is kept
    assert torch.equal(kept, torch.ones(8, 6))
    assert net[2].weight.grad is None
    twin, losses = copy.deepcopy(net), []
    weights[:] = [twin[0].weight, twin[2].weight]
    steps = torch.optim.SGD(twin.parameters(), lr=0.5)
    for batch in given[:4]:
        steps.zero_grad()
        loss = loss_fn(twin(batch[0]), batch[1])
        loss.backward()
        losses.append(loss.item())
        steps.step()
    assert plain == pytest.approx(losses, rel=1e-6)
    weights[:] = [net[0].weight, net[2].weight]
    assert own == pytest.approx([train_step(net, optimizer, batch).item() for batch in given[:4]], rel=1e-6)


def test_gradients_of_other_models_are_not_touched() -> None:
    net, optimizer, _ = training()
    other = nn.Linear(3, 3)
    gradwatch.what_if(
        net, optimizer, lambda outputs, targets: F.cross_entropy(other(outputs), targets), batches(), steps=2
    )
    assert all(p.grad is None for p in other.parameters())


def test_a_graph_that_is_alive_still_runs_backward() -> None:
    net, optimizer, _ = training()
    x, y = batches(1)[0]
    net.zero_grad()
    twin, begun = copy.deepcopy(net).train(), torch.get_rng_state()
    F.cross_entropy(twin(x), y).backward()
    torch.set_rng_state(begun)
    loss = F.cross_entropy(net.train()(x), y)
    gradwatch.what_if(net, optimizer, F.cross_entropy, batches(), steps=2, changes=["learning rate / 10"])
    loss.backward()
    wanted = [p.grad for p in twin.parameters() if p.grad is not None]
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(found) == len(wanted) > 2
    assert all(torch.equal(p, q) for p, q in zip(found, wanted, strict=True))


def test_a_loader_is_not_consumed_and_its_generator_goes_on() -> None:
    net, optimizer, _ = training()
    x, y = torch.randn(64, 6), torch.arange(64) % 3
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)
    running = iter(loader)
    next(running)
    before = generator.get_state(), torch.get_rng_state()
    gradwatch.what_if(net, optimizer, F.cross_entropy, loader, steps=2, changes=["learning rate / 10"])
    assert same(before, (generator.get_state(), torch.get_rng_state()))
    assert len(list(running)) == 7


def test_generators_that_the_loss_reaches_are_put_back() -> None:
    net, optimizer, _ = training()

    class Owner:
        def __init__(self) -> None:
            self.generator, self.numbers = torch.Generator().manual_seed(3), np.random.RandomState(3)

        def loss(self, model, batch):
            noise = torch.randn(batch[0].shape, generator=self.generator) * self.numbers.rand()
            return F.cross_entropy(model(batch[0] + noise), batch[1])

    owner = Owner()
    before = owner.generator.get_state(), owner.numbers.get_state()[2]
    found = gradwatch.what_if(
        net,
        optimizer,
        lambda model, batch: owner.loss(model, batch),
        batches(),
        steps=2,
        changes=["learning rate / 10"],
    )
    assert found.tried
    assert same(before, (owner.generator.get_state(), owner.numbers.get_state()[2]))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS, torch.optim.RMSprop], ids=lambda m: m.__name__)
def test_the_training_as_it_is_takes_the_steps_that_the_loop_would(make) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = make(net.parameters(), lr=0.05)
    given = batches(6)
    found = gradwatch.what_if(net, optimizer, F.cross_entropy, given, steps=4, changes=["learning rate / 10"])
    losses = []
    for x, y in given[:4]:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert found.control.losses == pytest.approx(losses, rel=1e-6)


def test_every_built_in_change_has_a_name_of_its_own_and_says_what_it_means() -> None:
    assert len({change.name for change in CHANGES}) == len(CHANGES)
    assert all(change.cause and change.advice.endswith(".") for change in CHANGES)
