"""What torch does, and what our hooks make of it: H1 to H23, one by one where they show from outside."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.errors import GradwatchWarning
from gradwatch.hooks import HookManager, Observer, scale

from .conftest import Net, num_torch_hooks


def step(model, x):
    model.zero_grad()
    model(x).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def in_place_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def test_in_place_relu_after_a_backward_hooked_module_works():
    """H1, H2: torch's full hook makes it raise; ours sees the gradient as it was before the in-place operation."""
    x = torch.randn(3, 4)
    reference = in_place_net()
    wanted = step(reference, x)
    broken = in_place_net()
    broken[0].register_full_backward_hook(lambda m, i, o: None)
    with pytest.raises(RuntimeError, match="being modified inplace"):
        step(broken, x)
    model = in_place_net()
    seen = []
    HookManager(model).add("0:grad_output", lambda g, p: seen.append(g.clone()))
    found = step(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(seen[0].sum(0), wanted[1])  # the bias's gradient is the sum of the gradients of the output


@pytest.mark.parametrize("way", ["one", "two hooks", "cache"])
def test_a_gradient_of_a_view_that_is_changed_in_place_later_is_seen(way):
    """A Linear's output on sequences may be a view: in-place operations drop torch's tensor hooks on it silently."""
    x = torch.randn(2, 3, 4)
    model = in_place_net()
    is_view = model[0](x)._is_view()  # in torch 2.15 no more
    silent = []
    handle = model[0].register_forward_hook(lambda m, a, o: o.register_hook(silent.append) and None)
    wanted = step(model, x)
    handle.remove()
    assert (silent == []) is is_view
    seen = []
    hooks = HookManager(model)
    if way == "cache":
        seen = [hooks.run_with_cache(x, gradients=lambda out: out.sum())[1].gradients["0:output"]]
    else:
        for _ in range(1 if way == "one" else 2):
            hooks.add("0:grad_output", lambda g, p: seen.append(g.clone()))
        found = step(model, x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(seen) == (2 if way == "two hooks" else 1)
    assert seen[0].shape == (2, 3, 4)
    assert torch.allclose(seen[0].sum((0, 1)), wanted[1])
    hooks.add("0:grad_output", scale(2.0))
    assert torch.allclose(step(model, x)[0], 2 * wanted[0])


def test_a_view_that_nothing_changes_is_seen_once_in_each_backward(net, x):
    hooks = HookManager(net)
    seen = []
    hooks.add("embed:grad_output", lambda g, p: seen.append(g.sum().item()))
    loss = net(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_capture_is_not_changed_by_a_later_in_place_operation():
    model, x = in_place_net(), torch.randn(3, 4)
    _, cache = HookManager(model).run_with_cache(x)
    assert torch.equal(cache["0:output"], F.linear(x, model[0].weight, model[0].bias))
    assert (cache["0:output"] < 0).any()
    capture = HookManager(model).capture("0", max_states=1)
    model(x)
    assert torch.equal(capture[0].output, cache["0:output"])


def test_grad_input_is_the_modules_own_share_and_an_aliased_inputs_gradient_the_total():
    """H3."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, x):
            x = x * 1
            return self.a(x) + self.b(x)

    model, x = Branches(), torch.randn(2, 3, requires_grad=True)
    own, total = [], []
    hooks = HookManager(model, aliases={"middle": "a:input"})
    hooks.add("a:grad_input", lambda g, p: own.append(g))
    hooks.add("middle:grad_output", lambda g, p: total.append(g))
    model(x).sum().backward()
    assert torch.allclose(own[0], torch.ones(2, 3) @ model.a.weight)
    assert torch.equal(total[0], x.grad)


@pytest.mark.parametrize("kind", ["list", "dict", "state"])
def test_backward_hooks_fire_where_torchs_never_do(kind):
    """H4: lists and dicts, and nested tensors that alone carry the loss."""

    class Odd(nn.Module):
        def forward(self, x):
            return {"list": [x * 2], "dict": {"y": x * 2}, "state": (x * 2, (x * 3, 1))}[kind]

    x = torch.randn(2, requires_grad=True)
    model = Odd()
    seen = []
    HookManager(model).add(":grad_output", lambda g, p: seen.append(p.leaf))
    out = model(x)
    {"list": lambda: out[0], "dict": lambda: out["y"], "state": lambda: out[1][0]}[kind]().sum().backward()
    assert seen == [{"list": "0", "dict": "y", "state": "1.0"}[kind]]


def test_a_first_layer_whose_input_needs_no_gradient(net, x):
    """H5: grad_output fires there, grad_input has nothing to show, and coverage says why."""
    hooks = HookManager(net)
    seen = []
    hooks.add("embed:grad_output", lambda g, p: seen.append(p.name))
    hooks.add("embed:grad_input", lambda g, p: seen.append(p.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its full hook
        step(net, x)
    assert seen == ["embed:grad_output"]
    assert hooks.coverage().silent[0].reason == "none of its inputs requires a gradient"


def test_order_of_the_backward_ports(x):
    """H6."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    order = []
    hooks = HookManager(model)
    for point in ("1:grad_input", "1.weight:accumulated_grad", "1.weight:grad", "1:grad_output"):
        hooks.add(point, lambda g, p: order.append(p.port))
    step(model, x)
    assert order == ["grad_output", "grad", "accumulated_grad", "grad_input"]


def test_an_intervention_at_grad_output_changes_the_modules_own_weight_gradients(net, x):
    """H7: a change in torch's full backward hook never does."""
    wanted = step(net, x)
    names = [name for name, _ in net.named_parameters()]
    with HookManager(net) as hooks:
        hooks.add("head:grad_output", scale(0.1))
        found = dict(zip(names, step(net, x), strict=True))
    assert torch.allclose(found["head.weight"], 0.1 * dict(zip(names, wanted, strict=True))["head.weight"])
    with HookManager(net) as hooks:
        hooks.add("head:grad_input", scale(0.1))
        found = dict(zip(names, step(net, x), strict=True))
    reference = dict(zip(names, wanted, strict=True))
    assert torch.equal(found["head.weight"], reference["head.weight"])
    assert torch.allclose(found["embed.weight"], 0.1 * reference["embed.weight"], atol=1e-7)


def checkpointed(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    return Checkpointed()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_are_flagged_and_counts_are_right(use_reentrant):
    """H12."""
    model, x = checkpointed(use_reentrant), torch.randn(2, 4, requires_grad=True)
    hooks = HookManager(model)
    plain, quiet, back = [], [], []
    hook = hooks.add("body.0:output", lambda t, p: plain.append((p.is_recompute, p.call)))
    hooks.observe("body.0:output", lambda t, p: quiet.append(t.norm()))
    hooks.add("body.0:grad_output", lambda t, p: back.append(p.call))
    model(x).sum().backward()
    assert plain == [(False, 0), (True, 0)]
    assert hook.calls == 1
    assert len(quiet) == 1
    assert back == [0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_interventions_under_checkpointing_give_the_gradients_they_give_without(use_reentrant):
    x = torch.randn(2, 4, requires_grad=True)
    model = checkpointed(use_reentrant)
    HookManager(model).add("body.1:output", lambda t, p: t * 3)
    found = step(model, x)
    plain = checkpointed(use_reentrant)
    plain.forward = plain.body.forward
    HookManager(plain).add("body.1:output", lambda t, p: t * 3)
    assert all(torch.allclose(a, b) for a, b in zip(found, step(plain, x), strict=True))


def test_observing_maths_that_differs_at_recompute_raises_no_checkpoint_error():
    model, x = checkpointed(False), torch.randn(2, 4, requires_grad=True)
    kept = []
    HookManager(model).add("body.0", Observer(lambda t, p: kept.append(t.pow(2).sum())), recompute=True)
    model(x).sum().backward()
    assert len(kept) == 2


@pytest.mark.parametrize("port", ["output", "grad_output"])
def test_hooks_added_before_the_first_compiled_call_fire_at_every_call(port):
    """H13."""
    torch.compiler.reset()
    model, x = in_place_net(), torch.randn(3, 4)
    seen = []
    HookManager(model).observe(f"0:{port}", lambda t, p: seen.append(p.step))
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        compiled(x).sum().backward()
    assert seen == [0, 1, 2]
    torch.compiler.reset()


def test_attaching_to_a_compiled_model_warns_and_coverage_tells_what_was_compiled_away():
    torch.compiler.reset()
    model, x = in_place_net(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    hooks = HookManager(compiled)
    with pytest.warns(GradwatchWarning, match="is compiled .* may be ignored"):
        hooks.add("*.0:output", lambda t, p: None)
    compiled(x)
    silent = hooks.coverage().silent
    assert [entry.kind for entry in silent] == ["compiled away"]
    torch.compiler.reset()


def test_accumulation_and_autograd_grad_at_the_ports_of_parameters(net, x):
    """H16."""
    hooks = HookManager(net)
    each, running = [], []
    hooks.add("head.bias:grad", lambda g, p: each.append(g.sum().item()))
    hooks.add("head.bias:accumulated_grad", lambda g, p: running.append(g.sum().item()))
    for _ in range(2):
        net(x).sum().backward()
    assert each == [30.0, 30.0]
    assert running == [30.0, 60.0]
    torch.autograd.grad(net(x).sum(), [net.head.bias])
    assert len(each) == 3
    assert len(running) == 2


def test_a_replaced_gradient_at_both_ports_of_a_parameter(net, x):
    hooks = HookManager(net)
    hooks.add("head.bias:grad", lambda g, p: g * 2)
    hooks.add("head.bias:accumulated_grad", lambda g, p: g + 1)
    net(x).sum().backward()
    assert torch.equal(net.head.bias.grad, torch.full((3,), 21.0))


def test_an_expanded_gradient_can_be_replaced(net, x):
    """H18: `.sum()` gives an expanded gradient that can't be edited in place."""
    HookManager(net).add(":grad_output", lambda g, p: g * 2)
    net(x).sum().backward()
    assert torch.equal(net.head.bias.grad, torch.full((3,), 20.0))


def test_modules_that_are_never_called_are_named_by_coverage():
    """H19."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    hooks = HookManager(model)
    hooks.add("*:output", lambda t, p: None)
    x = torch.randn(1, 3, 4)
    model(x, x, x)
    entry = next(e for e in hooks.coverage() if e.point == "out_proj:output")
    assert (entry.kind, entry.fired) == ("never called", 0)
    assert "uses this module's weight in a function" in entry.reason


def test_a_replaced_module_is_named_by_coverage(net, x):
    """H20."""
    hooks = HookManager(net)
    hooks.add("head", lambda t, p: None)
    hooks.add("head.weight:grad", lambda t, p: None)
    net.head = nn.Linear(8, 3)
    net(x).sum().backward()
    assert [entry.kind for entry in hooks.coverage()] == ["module replaced", "module replaced"]


def test_sparse_gradients_pass(x):
    """H22."""
    model = nn.Embedding(10, 4, sparse=True)
    seen = []
    hooks = HookManager(model)
    hooks.add("weight:grad", lambda g, p: seen.append(g.is_sparse))
    hooks.monitor("weight:grad")
    model(torch.tensor([1, 2])).sum().backward()
    assert seen == [True]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(net, x, context):
    hooks = HookManager(net)
    seen = []
    hooks.observe("*:output", lambda t, p: seen.append(p.path))
    hooks.add("head:grad_output", lambda t, p: seen.append("never"))
    with context():
        net(x)
        _, cache = hooks.run_with_cache(x)
    assert "never" not in seen
    assert len(cache) >= len(list(net.modules())) - 1
    reason = next(e.reason for e in hooks.coverage() if e.point == "head:grad_output")
    assert reason.startswith("what it gave out does not require a gradient")


def test_under_autocast_the_tensors_are_what_flows(net, x):
    seen = set()
    HookManager(net).observe("head:output", lambda t, p: seen.add(t.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(x).float().sum().backward()
    assert seen == {torch.bfloat16}


def test_a_module_that_returns_its_parameter_gathers_no_hooks():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.weight

    model = Constant()
    hooks = HookManager(model)
    seen = []
    hooks.add(":grad_output", lambda g, p: seen.append(1))
    for _ in range(3):
        model(None).sum().backward()
    assert seen == [1, 1, 1]
    hooks.close()
    assert num_torch_hooks(model) == 0


def test_a_submodule_called_alone_fires_too(x):
    net = Net(1)
    seen = []
    HookManager(net).add("embed", lambda t, p: seen.append(p.name))
    net.embed(x)
    assert seen == ["embed:output"]
