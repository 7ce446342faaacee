"""No silent nothing: what was asked for in a run and did not happen there is an error that says why."""

import functools
import warnings

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, GradwatchWarning, HookNeverFired, UnknownNameError, UnknownPathError
from gradwatch.hooks import HookManager, zero

from .conftest import num_torch_hooks


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True)


@pytest.fixture
def q():
    return torch.randn(2, 3, 8)


def run_hooks(hooks, args, points, **options):
    return hooks.run_with_hooks(*args, hooks=[(points, zero())], **options)


def run_cache(hooks, args, points, **options):
    return hooks.run_with_cache(*args, points=points, **options)


def run_temporary(hooks, args, points, **options):
    with hooks.temporary((points, zero()), **options):
        return hooks.model(*args)


WAYS = [
    pytest.param(run_hooks, id="run_with_hooks"),
    pytest.param(run_cache, id="run_with_cache"),
    pytest.param(run_temporary, id="temporary"),
]


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("points", ["out_proj", "out*", ["out_proj:output"], lambda p: p.path == "out_proj"])
def test_a_point_that_is_never_reached_is_an_error_with_its_reason(attention, q, run, points):
    hooks = HookManager(attention)
    with pytest.raises(HookNeverFired, match=r"'out.*' never fired in this run: nn.MultiheadAttention uses") as caught:
        run(hooks, (q, q, q), points)
    assert caught.value.kind == "never called"
    assert num_torch_hooks(attention) == 0
    assert len(hooks) == 0


@pytest.mark.parametrize("run", WAYS)
def test_missing_ignore_lets_it_pass_and_anything_else_is_refused(attention, q, run):
    hooks = HookManager(attention)
    run(hooks, (q, q, q), "out_proj", missing="ignore")
    with pytest.raises(UnknownNameError, match="there is no way to treat what never fired 'igmore'"):
        run(hooks, (q, q, q), "out_proj", missing="igmore")
    assert num_torch_hooks(attention) == 0


@pytest.mark.parametrize("run", WAYS)
def test_of_a_pattern_one_point_has_to_fire_and_of_a_list_each_part(attention, q, run):
    hooks = HookManager(attention)
    run(hooks, (q, q, q), "*:output")
    with pytest.raises(HookNeverFired, match="'out_proj:output'"):
        run(hooks, (q, q, q), [":output", "out_proj:output"])


def test_what_a_pattern_missed_is_told_by_the_cache(attention, q):
    _, cache = HookManager(attention).run_with_cache(q, q, q)
    assert list(cache.missing) == ["out_proj:output"]
    assert "never calls it" in cache.missing["out_proj:output"]


def test_a_sweep_over_a_point_that_never_fires_is_no_table_of_zeros(attention, q):
    hooks = HookManager(attention)
    with pytest.raises(HookNeverFired):
        hooks.sweep("out_proj", [0, 1], lambda out: out[0].sum(), inputs=(q, q, q), intervention=zero, progress=False)


def test_a_hook_on_a_gradient_that_cannot_come_is_an_error(net, x):
    hooks = HookManager(net)
    with torch.no_grad(), pytest.raises(HookNeverFired, match="does not require a gradient"):
        hooks.run_with_hooks(x, hooks=[("head:grad_output", zero())])
    out = hooks.run_with_hooks(x, hooks=[("head:grad_output", zero()), ("head:grad_input", lambda g, p: g * 0)])
    out.sum().backward()
    assert not net.head.weight.grad.any()


def test_a_block_that_ends_by_an_error_tells_of_that_error_alone(net):
    with pytest.raises(ZeroDivisionError), HookManager(net).temporary(("head", zero())):
        raise ZeroDivisionError
    assert num_torch_hooks(net) == 0


def test_a_hook_that_its_own_condition_keeps_quiet_is_no_surprise(net, x):
    hooks = HookManager(net)
    with hooks.temporary(("head", zero()), when=lambda point: False) as (hook,):
        net(x)
    with hooks.temporary(("head", zero())) as (other,):
        other.disable()
        net(x)
    assert (hook.calls, other.calls) == (0, 0)


def test_a_point_behind_the_stop_is_an_error(net, x):
    with pytest.raises(HookNeverFired, match=r"the run ended at stop_at='blocks\.1' before it"):
        HookManager(net).run_with_hooks(x, hooks=[("head", zero())], stop_at="blocks.1")


class Open(nn.Module):
    """Takes any keyword, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.got = {}

    def forward(self, x, labels=None, **kwargs):
        self.got = {"labels": labels, **kwargs}
        return self.net(x)


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("fwd_hooks", "hooks="),
        ("hook", "hooks="),
        ("bwd_hooks", "hooks="),
        ("hoks", "hooks="),
        ("fwd_hook", "hooks="),
        ("name_filter", "points="),
        ("names_filter", "points="),
        ("point", "points="),
        ("incl_bwd", "gradients="),
    ],
)
def test_a_keyword_that_would_vanish_in_the_models_is_an_error(x, keyword, meant):
    hooks = HookManager(Open())
    for run in (hooks.run_with_hooks, hooks.run_with_cache):
        if run == hooks.run_with_hooks and meant in ("points=", "gradients="):
            continue
        with pytest.raises(ConfigError, match=f"has no keyword '{keyword}'.*Did you mean .{meant}.*model_kwargs="):
            run(x, **{keyword: [("net", zero())]})


def renames(old, new):
    """A decorator that takes a keyword's old name too, and reads one for itself."""

    def around(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            kwargs.pop("return_dict", None)
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return around


def test_keywords_that_a_decorator_of_the_forward_knows_pass(x):
    class Renamed(Open):
        @renames("targets", "labels")
        def forward(self, x, labels=None, **kwargs):
            return super().forward(x, labels, **kwargs)

    hooks = HookManager(Renamed())
    hooks.run_with_hooks(x, targets=3, return_dict=True, hooks=[("net", zero())])
    assert hooks.model.got == {"labels": 3}
    with pytest.raises(ConfigError, match="has no keyword 'target'"):
        hooks.run_with_hooks(x, target=3)


def test_keywords_that_the_forward_names_pass_and_model_kwargs_pass_anything(x):
    hooks = HookManager(Open())
    hooks.run_with_hooks(x, labels=3, model_kwargs={"hooks": 4, "fwd_hooks": 5}, hooks=[("net", zero())])
    assert hooks.model.got == {"labels": 3, "hooks": 4, "fwd_hooks": 5}

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Open()

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    around = HookManager(Wrapper())
    around.run_with_cache(x, labels=3)
    assert around.model.inner.got == {"labels": 3}
    with pytest.raises(ConfigError, match="Did you mean 'hooks='"):
        around.run_with_hooks(x, fwd_hooks=[])


@pytest.mark.parametrize("hooked", ["the wrapper", "the model within"])
def test_hooks_on_what_was_compiled_before_are_told_of_at_every_call(hooked):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    hooks = HookManager(compiled if hooked == "the wrapper" else model)
    for _ in range(2):
        with pytest.warns(GradwatchWarning, match="is compiled"):
            hooks.add("0", lambda t, p: None).remove()
        with pytest.raises(HookNeverFired, match="traced without the hook"), hooks.temporary(("0", zero())):
            compiled(x)
        with pytest.warns(GradwatchWarning, match="compiled away"), hooks.temporary(("0", zero()), missing="ignore"):
            compiled(x)
    torch._dynamo.reset()


def test_a_model_that_nobody_compiled_is_not_said_to_be(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookManager(net).add("head", lambda t, p: None).remove()
    assert num_torch_hooks(net) == 0


def test_a_hook_on_attention_does_not_break_a_padded_batch_that_goes_as_a_nested_tensor():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    hooks = HookManager(encoder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of nested tensors
        bare = encoder(x, src_key_padding_mask=padding)
        with pytest.raises(HookNeverFired, match=r"nested tensor.*enable_nested_tensor=False"):
            hooks.run_with_hooks(x, src_key_padding_mask=padding, hooks=[("blocks.0.attn.hook_pattern", zero())])
        hooks.add("blocks.0.attn.hook_pattern", zero())
        assert torch.allclose(encoder(x, src_key_padding_mask=padding), bare, atol=1e-5)


def test_an_option_that_a_hook_does_not_have_is_an_error(net):
    hooks = HookManager(net)
    with pytest.raises(UnknownNameError, match=r"no option of a hook 'prority'\. Did you mean 'priority'"):
        hooks.add("head", zero(), prority=1)
    with pytest.raises(UnknownNameError, match=r"no option of a hook 'evry'\. Did you mean 'every'"):
        hooks.add("head", zero()).set_options(evry=1)


@pytest.mark.parametrize("looked", [False, True])
def test_a_research_name_of_a_model_that_has_none_says_why(net, x, looked):
    hooks = HookManager(net)
    with pytest.raises(UnknownPathError, match=r"It has no research names: (nothing attends|no inputs)") as told:
        hooks.run_with_cache(x, points="*.hook_pattern") if looked else hooks.add("*.hook_pattern", zero())
    assert ("nothing attends" in str(told.value)) == looked
