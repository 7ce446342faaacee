"""One function form at every port; observers cannot change anything; what goes wrong is said, by policy."""

import warnings

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, GradwatchWarning, HookError
from gradwatch.hooks import HookManager, Intervention, Observer

from .conftest import num_torch_hooks

PORTS = [
    "head:input",
    "head:output",
    "head:grad_output",
    "head:grad_input",
    "head.weight:grad",
    "head.weight:accumulated_grad",
]


def gradients(net, x):
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("point", PORTS)
def test_a_function_is_called_with_tensor_and_point_at_every_port(net, x, point):
    seen = []
    HookManager(net).add(point, lambda tensor, p: seen.append((type(tensor), p.port, p.phase)))
    gradients(net, x)
    port = point.split(":")[1]
    kind = seen[0][0]
    assert issubclass(kind, torch.Tensor)
    assert seen == [(kind, port, "forward" if port in ("input", "output") else "backward")]


@pytest.mark.parametrize("point", PORTS)
@pytest.mark.parametrize("policy", ["raise", "disable", "close"])
def test_a_failing_hook_acts_by_its_policy(net, x, point, policy):
    reference = gradients(net, x)
    hooks = HookManager(net)

    def fails(tensor, p):
        raise ValueError("my mistake")

    hook = hooks.add(point, fails, on_error=policy, id="bad")
    phase = "forward" if point.split(":")[1] in ("input", "output") else "backward"
    message = f"hook 'bad' at '{point}' raised in {phase}: ValueError: my mistake"
    if policy == "raise":
        with pytest.raises(HookError) as caught:
            gradients(net, x)
        assert str(caught.value) == message
        assert (caught.value.hook_id, caught.value.point, caught.value.phase) == ("bad", point, phase)
        assert isinstance(caught.value.__cause__, ValueError)
        return
    with pytest.warns(GradwatchWarning, match="the run goes on") as reports:
        found = gradients(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(net, x)
    assert len(reports) == 1
    assert all(torch.equal(found[name], wanted) for name, wanted in reference.items())
    assert str(hook.error) == message
    assert hook.is_enabled is False
    assert hooks.is_closed == (policy == "close")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        pytest.param(lambda t: False, "TypeError: a hook function returns None or a tensor. Got bool.", id="bool"),
        pytest.param(lambda t: (t,), "Got tuple", id="tuple"),
        pytest.param(lambda t: t[:1], "a replacement keeps the shape: \\(2, 5, 3\\). Got \\(1, 5, 3\\)", id="shape"),
        pytest.param(lambda t: t.double(), "keeps the dtype: torch.float32. Got torch.float64", id="dtype"),
        pytest.param(lambda t: t.to("meta"), "keeps the device: cpu. Got meta", id="device"),
    ],
)
@pytest.mark.parametrize("point", ["head:output", "head:grad_output"])
def test_a_replacement_keeps_shape_dtype_and_device(net, x, point, returned, message):
    """H11: torch would take False, or a handle that a lambda returns, as the output."""
    HookManager(net).add(point, lambda t, p: returned(t))
    with pytest.raises(HookError, match=message):
        gradients(net, x)


def test_what_an_observer_returns_is_dropped(net, x):
    reference = net(x)
    hooks = HookManager(net)
    hooks.observe("*:output", lambda t, p: t * 0)
    hooks.add("*:input", Observer(lambda t, p: False))
    assert torch.equal(net(x), reference)


@pytest.mark.parametrize("point", ["head:output", "head:input", "head:grad_output", "head.weight:grad"])
def test_an_observer_that_changes_the_tensor_in_place_is_an_error(net, x, point):
    HookManager(net).observe(point, lambda t, p: t.mul_(2))
    with pytest.raises(HookError, match="an observer changed the tensor in place"):
        gradients(net, x)


def test_an_observer_records_no_graph(net, x):
    seen = []
    HookManager(net).observe("head", lambda t, p: seen.append((t * 2).requires_grad))
    net(x)
    assert seen == [False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("point", ["head:grad_output", "head.weight:grad", "head:grad_input"])
def test_editing_a_gradient_in_place_is_an_error(net, x, point):
    """H18: autograd may share it with a sibling branch."""
    HookManager(net).add(point, lambda g, p: g.mul_(2))
    with pytest.raises(HookError, match="changed the gradient in place"):
        gradients(net, x)


def test_classes_with_state(net, x):
    class Clamp(Intervention):
        def __init__(self, most):
            super().__init__(why="keep it small")
            self.most = most
            self.num_clamped = 0

        def intervene(self, tensor, point):
            self.num_clamped += int((tensor.abs() > self.most).sum())
            return tensor.clamp(-self.most, self.most)

        def reset(self):
            self.num_clamped = 0

    clamp = Clamp(0.1)
    hook = HookManager(net).add("head", clamp)
    assert net(x).abs().max() <= 0.1
    assert clamp.num_clamped > 0
    assert hook.metadata == {"why": "keep it small"}
    hook.reset()
    assert clamp.num_clamped == 0


def test_a_bare_observer_without_a_function_says_so(net, x):
    HookManager(net).add("head", Observer())
    with pytest.raises(HookError, match="Observer needs a function"):
        net(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Pair()

    def forward(self, x, *, scale=None):
        found = self.inner(x, extra={"scale": scale, "n": 3})
        return found["a"] + found["b"][1]


class Pair(nn.Module):
    def forward(self, x, extra):
        return {"a": x * extra["scale"], "b": [None, x + 1]}


def test_nested_values_are_visited_leaf_by_leaf():
    model, x = Nested(), torch.ones(2)
    hooks = HookManager(model)
    seen = []
    hooks.add("inner:input", lambda t, p: seen.append(p.leaf))
    hooks.add("inner:output", lambda t, p: seen.append(p.leaf))
    hooks.add("inner:output", lambda t, p: t * 10, leaf="b.1")
    out = model(x, scale=torch.full((2,), 3.0))
    assert seen == ["0", "extra.scale", "a", "b.1"]
    assert torch.equal(out, torch.full((2,), 23.0))


def test_a_replaced_leaf_leaves_the_users_containers_alone():
    model = Pair()
    kept = {"scale": torch.ones(2)}
    HookManager(model).add(":input", lambda t, p: t * 5)
    model(torch.ones(2), kept)
    assert torch.equal(kept["scale"], torch.ones(2))


def test_raw_hands_over_torchs_own_arguments():
    model, x = Nested(), torch.ones(2)
    hooks = HookManager(model)
    seen = []

    def look(raw, point):
        args, kwargs, output = raw
        seen.append((len(args), sorted(kwargs), type(output).__name__))

    hooks.add("inner:output", look, raw=True)
    hooks.add("inner:input", look, raw=True)
    hooks.add("inner:input", lambda raw, p: ((raw.args[0] * 2,), raw.kwargs), raw=True)
    hooks.add("inner:output", lambda raw, p: {"a": raw.output["a"] * 100, "b": raw.output["b"]}, raw=True)
    out = model(x, scale=torch.ones(2))
    assert seen == [(1, ["extra"], "NoneType"), (1, ["extra"], "dict")]
    assert torch.equal(out, torch.full((2,), 203.0))
    with pytest.raises(ConfigError, match="it is for"):
        hooks.add("inner:grad_output", look, raw=True)


def test_hooks_may_come_and_go_from_within_a_hook(net, x):
    hooks = HookManager(net)
    seen = []

    def once_then_another(t, p):
        p.hook.remove()
        hooks.add("blocks.0", lambda t, p: seen.append("late"))

    hooks.add("blocks.0", once_then_another)
    net(x)
    net(x)
    assert seen == ["late"]
    hooks.close()
    assert num_torch_hooks(net) == 0
