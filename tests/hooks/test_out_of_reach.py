"""What takes no hooks, or not yet, or is asked for under another name: the rest goes on, and the reason is said."""

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, UnavailablePointError, UnknownPathError
from gradwatch.hooks import ActivationStore, HookManager

from .conftest import num_torch_hooks

X = torch.randn(2, 4)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def see(tensor, point):
    return None


class PartlyScripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x):
        return self.scripted(self.first(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x):
        return self.cell(self.cell(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda hooks: hooks.run_with_cache(X), id="cache"),
        pytest.param(lambda hooks: hooks.run_with_hooks(X, hooks=[("*:output", see)]), id="pattern"),
        pytest.param(lambda hooks: hooks.observe(nn.Linear, see), id="class"),
        pytest.param(lambda hooks: hooks.observe(lambda point: True, see), id="predicate"),
        pytest.param(lambda hooks: hooks.monitor(), id="monitor"),
        pytest.param(lambda hooks: hooks.profile().stop(), id="profile"),
    ],
)
def test_a_scripted_part_takes_nothing_from_the_rest(look):
    model = PartlyScripted()
    hooks = HookManager(model)
    wanted = model(X)
    look(hooks)
    assert torch.equal(model(X), wanted)
    hooks.close()
    assert num_torch_hooks(model.first) == 0


def test_a_scripted_part_is_listed_with_the_reason_and_naming_it_says_the_same():
    hooks = HookManager(PartlyScripted())
    assert [p.available for p in hooks.points("*:output")] == [True, True]
    assert [bool(p.reason) for p in hooks.points("scripted") if not p.is_parameter] == [True] * 4
    for name in ("scripted", "scripted.0:grad_output"):
        with pytest.raises(UnavailablePointError, match="a ScriptModule, which torch takes no hooks on"):
            hooks.add(name, see)
    assert not len(hooks)


def test_a_lazy_parameter_can_be_hooked_once_it_is_there():
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))
    hooks = HookManager(model)
    with pytest.raises(UnavailablePointError, match="not initialised yet"):
        hooks.add("0.weight:grad", see)
    assert [p.path for p in hooks.add("*:grad", see).points] == ["1.weight", "1.bias"]
    model(X)
    seen = []
    hooks.observe("0.weight:grad", lambda grad, point: seen.append(grad))
    model(X).sum().backward()
    assert torch.equal(seen[0], model[0].weight.grad)


@pytest.mark.parametrize("port", ["grad", "accumulated_grad"])
def test_a_parameter_that_is_thawed_later_is_hooked_from_the_next_pass(port):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    hooks, names = HookManager(model), []
    hook = hooks.observe(f"*:{port}", lambda grad, point: names.append(point.path))
    model(X).sum().backward()
    assert sorted(names) == ["1.bias", "1.weight"]
    model[0].requires_grad_(True)
    names.clear()
    model(X).sum().backward()
    assert sorted(names) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    hook.remove()
    assert num_torch_hooks(model) == 0


def test_what_is_in_a_cache_several_times_is_in_it():
    _, cache = HookManager(Twice()).run_with_cache(X)
    assert "cell:output" in cache
    assert "other:output" not in cache
    with pytest.raises(ConfigError, match="ran 2 times"):
        cache.get("cell:output")
    assert cache.get("other:output") is None


def test_a_gradient_that_did_not_come_is_named_with_the_reason():
    hooks = HookManager(Unused())
    _, cache = hooks.run_with_cache(X, points=["used", "unused"], gradients=lambda output: output.sum())
    assert cache.missing == {"unused:grad_output": "the loss does not depend on what was there"}
    for ask in (lambda: cache["unused:grad_output"], lambda: cache.gradients["unused:output"]):
        with pytest.raises(UnknownPathError, match="It is missing: the loss does not depend on what was there"):
            ask()


def test_within_a_reentrant_checkpoint_no_gradient_is_followed_and_that_is_said():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True))

    hooks = HookManager(Checkpointed())
    x = X.clone().requires_grad_()
    _, cache = hooks.run_with_cache(x, points=["inner", "last"], gradients=lambda output: output.sum())
    assert list(cache.gradients) == ["last:output"]
    assert list(cache.missing) == ["inner:grad_output"]
    assert "a reentrant checkpoint" in cache.missing["inner:grad_output"]


def test_a_leaf_that_is_not_there_is_said_with_those_that_are():
    hooks = HookManager(nn.LSTM(4, 4))
    hooks.add(":output", see, leaf="h")
    hooks.model(X)
    assert hooks.coverage()[0].reason == "there is no leaf 'h', only '0', '1.0', '1.1'"


def test_a_stored_batch_gives_the_leaves_of_a_nested_output(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.LSTM(4, 4)
    with HookManager(model).capture(":output", store=tmp_path):
        output, (h, c) = model(X)
    leaves = ActivationStore(tmp_path)[0][":output"]
    assert list(leaves) == ["0", "1.0", "1.1"]
    for name, tensor in zip(leaves, (output, h, c), strict=True):
        assert torch.equal(leaves[name], tensor)
    with pytest.raises(KeyError, match=r"has no ':outputs'\. Did you mean"):
        ActivationStore(tmp_path)[0][":outputs"]
