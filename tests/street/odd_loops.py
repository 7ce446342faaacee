"""Loops of odd forms: many optimizers, steps in backward, failures, resumes, penalties, parts that come and go."""

from __future__ import annotations

import copy
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .data import batches, digits
from .street import Street, program


def net(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def flat(street: Street, size: int = 32, steps: int | None = None):
    images, labels = digits()
    return batches(images.flatten(1), labels, size=size, steps=steps or street.steps)


@program()
def optimizer_for_each_layer(street: Street):
    """Five optimizers of five classes, one for each layer and one twice, with a schedule each."""
    model = nn.Sequential(*net(), nn.Linear(10, 10), nn.Linear(10, 10))
    classes = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RAdam, torch.optim.Rprop, torch.optim.Adadelta)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    optimizers = [each(layer.parameters(), lr=1e-2) for each, layer in zip(classes, layers, strict=True)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.999) for each in optimizers]
    with street.watch(model, optimizers) as watch:
        for x, y in flat(street):
            loss = F.cross_entropy(model(x), y)
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            for each in schedules:
                each.step()
            street.note(loss)
    return model, optimizers


@program()
def gradient_penalty(street: Street):
    """A penalty on the gradient of all weights (create_graph), by `autograd.grad` and then by backward(inputs=...)."""
    model = net(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weights = list(model.parameters())
    with street.watch(model, optimizer) as watch:
        for x, y in flat(street):
            loss = F.cross_entropy(model(x), y)
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            penalised = loss + 0.01 * torch.stack([slope.square().sum() for slope in slopes]).sum()
            optimizer.zero_grad(set_to_none=False)
            penalised.backward(inputs=weights)
            watch.step(loss=loss)
            street.note(loss, penalised)
    return model, optimizer


@program()
def sharpness_aware(street: Street):
    """Two passes a step: the weights are moved to where the loss is worst, and back; the second gradient counts."""
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with street.watch(model, optimizer) as watch:
        for x, y in flat(street):
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                length = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                moves = [0.05 * p.grad / (length + 1e-12) for p in model.parameters()]
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            watch.step(loss=loss)
            optimizer.zero_grad()
            street.note(loss)
    return model, optimizer


@program()
def steps_by_halves(street: Street):
    """The loop steps itself, with a closure that only returns the loss; some batches are left out; others retained."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(flat(street)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            street.note(loss)
            if i % 10 == 3:
                continue
            loss.backward(retain_graph=i % 5 == 0)
            if i % 5 == 0:
                loss.backward()
            watch.after_backward(loss)
            optimizer.step(lambda loss=loss: loss)
            watch.after_step()
    return model, optimizer


@program()
def frozen_by_turns(street: Street):
    """Layers freeze and thaw, one is replaced with its parameters in a new group, one is deleted."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(flat(street)):
            model[0].requires_grad_(i % 8 < 4)
            if i == street.steps // 3:
                for p in model[4].parameters():
                    optimizer.state.pop(p)
                model[4] = nn.Linear(32, 10)
                optimizer.param_groups[0]["params"] = list(model[:4].parameters())
                optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.02})
            if i == 2 * street.steps // 3:
                del model[3]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program(steps=55)
def saved_and_resumed(street: Street):
    """Checkpoints of model and optimizer in mid run, copies, pickles, and a move to float64 and back."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(flat(street)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
            if i % 20 == 10:
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "whole": model}, file)
                file.seek(0)
                read = torch.load(file, weights_only=False)
                model.load_state_dict(read["model"])
                optimizer.load_state_dict(read["optimizer"])
                twin = copy.deepcopy(model)
                F.cross_entropy(twin(x), y).backward()
                model.double().float()
    return model, optimizer


@program(saved=False)
def ensemble(street: Street):
    """Four networks stacked, one vmap over functional_call; the module that is watched has never been called."""
    members = [net(16) for _ in range(4)]
    stacked, buffers = torch.func.stack_module_state(members)
    model = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value) for name, value in stacked.items()})
    base = copy.deepcopy(members[0]).to("meta")

    def score(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (weights, buffers), (x,))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    names = list(stacked)
    with street.watch(model, optimizer) as watch:
        for x, y in flat(street):
            weights = {name: model[name.replace(".", "_")] for name in names}
            scores = torch.vmap(score, in_dims=(0, None))(weights, x)
            loss = F.cross_entropy(scores.flatten(0, 1), y.repeat(4))
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


class Stepping(torch.optim.SGD):
    """Has a step of its own around the inherited one, keeps tensors and callables in its state, changes `.grad`."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.5)
        self.state["calls"] = 0
        self.lookup = {"key": lambda: self}

    @torch.no_grad()
    def step(self, closure=None):
        self.state["calls"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sub_(p.grad.mean())
        return super().step(closure)


@program()
def optimizer_of_ones_own(street: Street):
    model = net()
    optimizer = Stepping(model.named_parameters(), lr=0.1)
    with street.watch(model, optimizer) as watch:
        for x, y in flat(street):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program()
def step_in_backward(street: Street):
    """Each parameter has an optimizer that steps in a hook and drops the gradient: only the head is left to step."""
    model = net()
    trunk, head = list(model[:4].parameters()), list(model[4].parameters())
    inside = {p: torch.optim.SGD([p], lr=0.05) for p in trunk}

    def step(p: Tensor) -> None:
        inside[p].step()
        inside[p].zero_grad()

    for p in trunk:
        p.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(head, lr=0.05)
    with street.watch(model, optimizer) as watch:
        for x, y in flat(street):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            street.note(loss)
    return model, optimizer, list(inside.values())


@program(steps=55)
def watches_in_a_row(street: Street):
    """A notebook: the model is watched again and again, one watch in another, one left open by an exception."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data = iter(flat(street))

    def some(steps: int, fails: bool) -> None:
        with street.watch(model, optimizer) as watch:
            for _ in range(steps):
                x, y = next(data)
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                watch.step(loss=loss)
                street.note(loss)
            if fails:
                raise KeyboardInterrupt

    for turn in range(6):
        try:
            some(street.steps // 6, fails=turn % 2 == 1)
        except KeyboardInterrupt:
            continue
    return model, optimizer
