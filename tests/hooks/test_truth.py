"""What captures, monitors, profiles, managers and errors say is true, and they go when they are let go of."""

import gc
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from gradwatch import errors
from gradwatch.errors import ConfigError, GradwatchWarning, HookError
from gradwatch.hooks import Capture, HookManager, dead, exceeds, non_finite

from .conftest import Net, num_torch_hooks


class Of(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


UNUSUAL = {
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.to(torch.int64),
    "bits": lambda x: x > 0,
    "empty": lambda x: x[:0],
    "meta": lambda x: x.to("meta"),
}
LOOKS = {
    "monitor": lambda h: h.monitor(":output"),
    "non_finite": lambda h: h.break_when(":output", non_finite),
    "exceeds": lambda h: h.break_when(":output", exceeds(1e9)),
    "dead": lambda h: h.break_when(":output", dead),
    "capture": lambda h: h.capture(""),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_only_looks_never_ends_a_run_whatever_the_tensors_are(kind, look):
    model = Of(UNUSUAL[kind])
    hooks = HookManager(model)
    LOOKS[look](hooks)
    x = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 6.0]])
    if (kind, look) == ("meta", "monitor"):
        pytest.skip("a monitor on meta tensors has sums on meta")
    if kind == "meta" and look != "capture":
        with pytest.warns(GradwatchWarning, match="meta device has no numbers"):
            assert model(x) is not None
        return
    assert model(x) is not None


@pytest.mark.parametrize("look", [name for name in LOOKS if name != "capture"])
def test_inside_vmap_they_pass_over_and_say_so_once(look):
    model = nn.Linear(3, 3)
    hooks = HookManager(model)
    made = LOOKS[look](hooks)
    with pytest.warns(GradwatchWarning, match="out of reach") as said:
        torch.func.vmap(lambda x: model(model(x)))(torch.randn(5, 3))
    assert len(said) == 1
    assert list((made if look == "monitor" else made.fn).skipped) == [":output"]


def test_a_monitor_reads_unusual_tensors_right():
    x = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 6.0]])
    for kind, count in (("sparse", 6), ("nested", 5), ("quantised", 6), ("float8", 6)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Of(UNUSUAL[kind])
            monitor = HookManager(model).monitor(":output")
            model(x)
        wanted = x.flatten() if count == 6 else torch.cat([x[0], x[1, :2]])
        found = monitor[":output"]
        assert (found.count, found.zero_fraction) == (count, (wanted == 0).double().mean().item())
        assert found.mean == pytest.approx(wanted.double().mean().item())
        assert found.std == pytest.approx(wanted.double().std(correction=0).item())


def test_a_small_spread_around_a_large_mean_is_seen():
    parts = [1e6 + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = nn.Identity()
    hooks = HookManager(model)
    first, second, whole = (hooks.monitor(":output") for _ in range(3))
    second.hook.disable()
    for i, part in enumerate(parts):
        if i == 2:
            first.close()
            second.hook.enable()
        model(part)
    wanted = torch.cat(parts).double().std(correction=0).item()
    assert whole[":output"].std == pytest.approx(wanted, rel=1e-9)
    assert first.merge(second)[":output"].std == pytest.approx(wanted, rel=1e-9)


def test_a_monitor_is_a_context_with_own_measures_and_a_series(net, x):
    with HookManager(net).monitor("head", metrics={"l1": lambda t: t.abs().mean()}, history=2) as monitor:
        for k in range(4):
            net(x * k)
    assert num_torch_hooks(net) == 0
    assert [step for step, _ in monitor.over_time("head:output")] == [2, 3]
    wanted = sum(net(x * k).abs().mean().item() for k in range(4)) / 4
    assert monitor["head:output"].metrics["l1"] == pytest.approx(wanted)
    with pytest.raises(ConfigError, match="keeps no steps apart"):
        HookManager(net).monitor("head").over_time("head:output")


def test_a_breakpoint_holds_as_often_as_it_is_asked_to(net, x):
    hooks, seen = HookManager(net), []
    few = hooks.break_when("head", exceeds(0.0), action=seen.append, times=2)
    every = hooks.break_when("head", exceeds(0.0), action=lambda hit: None, times=None)
    for _ in range(4):
        net(x)
    assert (len(seen), len(few.fn.hits), len(every.fn.hits)) == (2, 2, 4)


def test_backward_times_do_not_grow_with_the_steps_before():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    leaf = torch.randn(4, 8, requires_grad=True)
    for given in (x, leaf):
        with HookManager(model).profile() as profile:
            for _ in range(5):
                model(given).sum().backward()
        spans = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in profile.chrome_trace()["traceEvents"] if backward_of_root(e)
        )
        assert len(spans) == 5
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert not leaf._backward_hooks


def backward_of_root(event):
    return event["name"] == "(model)" and event["cat"] == "backward"


@pytest.mark.parametrize("on_error", ["disable", "warn"])
def test_a_store_that_fails_does_not_end_the_run(tmp_path, net, x, on_error):
    folder = tmp_path / "states"
    captured = HookManager(net).capture("head", store=folder, on_error=on_error)
    wanted = net(x)
    net(x)
    shutil.rmtree(folder)
    with pytest.warns(GradwatchWarning, match="the run goes on") as said:
        found = [net(x) for _ in range(3)]
    assert all(torch.equal(out, wanted) for out in found)
    assert len(said) == (1 if on_error == "disable" else 3)
    with pytest.warns(GradwatchWarning, match="could not be written"):
        captured.close()
    captured = HookManager(net).capture("head", store=folder, on_error="raise")
    net(x)
    shutil.rmtree(folder)
    with pytest.raises(HookError):
        net(x)


def test_captures_take_gradients_samples_and_bounds(net, x):
    hooks = HookManager(net, capture_limit_mb=1.0)
    both = hooks.capture("head", gradients=True, id="both")
    sampled = hooks.capture("blocks.?", every=2, when=lambda p: p.layer > 3, max_states_per_module=1, max_age=3)
    for _ in range(5):
        net(x).sum().backward()
    assert len(both) == 5
    assert all(torch.equal(s.grad_output, torch.ones(2, 5, 3)) for s in both)
    assert [(s.path, s.step) for s in sampled] == [("blocks.4", 4), ("blocks.5", 4)]
    assert hooks.captures["both"] is both
    assert hooks.clear_captures("both") == 5
    hooks.capture_limit_mb = both.options.memory_limit_mb or 240 / 2**20
    for _ in range(5):
        net(x).sum().backward()
    assert both.num_bytes + sampled.num_bytes <= 240


def test_states_are_saved_and_read_back_lazily(net, x, tmp_path):
    captured = HookManager(net).capture(["head", "embed"], inputs=True, gradients=True)
    lstm = nn.LSTM(4, 3)
    nested = HookManager(lstm).capture("")
    net(x).sum().backward()
    lstm(x)
    for made in (captured, nested):
        made.save(tmp_path / "states.safetensors")
        loaded = Capture.load(tmp_path / "states.safetensors")
        assert [(s.id, s.path, s.call, s.step) for s in loaded] == [(s.id, s.path, s.call, s.step) for s in made]
        for one, other in zip(loaded, made, strict=True):
            assert set(one.values) == set(other.values)
    assert torch.equal(Capture.load(tmp_path / "states.safetensors")[0].output["1.0"], nested[0].output["1.0"])
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(Exception, match="header"):
        Capture.load(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_a_model_is_freed_at_once_when_its_manager_is():
    program = """
    import gc, weakref, torch
    from torch import nn
    from gradwatch.hooks import HookManager
    torch.set_num_threads(1)
    x = torch.ones(1, 4)
    def closed(m):
        h = HookManager(m); h.observe("", lambda t, p: None); h.add("0:grad_input", print).remove(); m(x); h.close()
    def with_block(m):
        with HookManager(m) as h:
            out, cache = h.run_with_cache(x, gradients=lambda o: o.sum())
            h.run_with_hooks(x, hooks=[("0", lambda t, p: t), ("0:grad_output", lambda t, p: t)]).sum().backward()
    def unused(m): HookManager(m)
    def captured(m):
        h = HookManager(m)
        with h.capture("0", inputs=True, gradients=True): m(x).sum().backward()
    def profiled(m):
        h = HookManager(m)
        with h.profile(): m(x).sum().backward()
    def monitored(m):
        with HookManager(m).monitor("0"): m(x)
    def removed(m): HookManager(m).add("0", lambda t, p: None).remove()
    for use in (closed, with_block, unused, captured, profiled, monitored, removed):
        gc.collect(); gc.disable()
        m = nn.Sequential(nn.Linear(4, 4)); use(m); alive = weakref.ref(m); del m
        print(use.__name__, alive() is None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    freed = dict(line.split() for line in done.stdout.splitlines())
    assert len(freed) == 7
    assert set(freed.values()) == {"True"}, freed


def test_what_a_run_kept_is_freed_with_its_cache(net, x):
    hooks = HookManager(net)
    gc.collect()
    gc.disable()
    try:
        _, cache = hooks.run_with_cache(x, gradients=lambda out: out.sum())
        alive = [weakref.ref(t) for t in cache.values()]
        del cache
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_every_error_crosses_processes_with_its_data(net, x):
    hooks = HookManager(net)
    hooks.break_when("head", exceeds(0.0))
    with pytest.raises(errors.HookBreak) as caught:
        net(x)
    made = [
        caught.value,
        HookError("h", "p", "forward", ValueError("x")),
        errors.UnavailablePointError("p", "r"),
        errors.UnknownNameError("kind", "n", ["a"], where="w"),
        errors.UnknownPathError("p", ["a"], model_name="M"),
        errors.MissingExtraError("a", "b", "c"),
        errors.HookNeverFired("h", "p", "never called", "why"),
    ]
    for error in made:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert set(vars(again)) == set(vars(error))
    found = pickle.loads(pickle.dumps(caught.value))
    assert (found.point.name, found.point.step, found.hook_id) == ("head:output", 0, caught.value.hook_id)
    assert torch.equal(found.tensor, caught.value.tensor)


def test_a_second_manager_of_the_same_name_takes_the_place_of_the_first(net, x):
    wanted = net(x) * 2
    for _ in range(3):
        hooks = HookManager(net, name="mine")
        hooks.add("", lambda t, p: t * 2)
        assert torch.equal(net(x), wanted)
    assert not hooks.is_closed


def test_hooks_of_a_manager_that_nobody_holds_are_told_of():
    net = Net()

    def cell():
        namespace["hooks"] = HookManager(net)
        namespace["hooks"].add("", lambda t, p: t * 2)

    namespace = {}
    cell()
    with pytest.warns(GradwatchWarning, match="an earlier HookManager of this Net, which nobody holds any more"):
        cell()
    held = HookManager(nn.Linear(2, 2))
    held.add("", lambda t, p: t * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookManager(held.model).add("", lambda t, p: t * 2)
    assert len(held) == 1


class Halves(nn.Module):
    """Calls itself, and after an error of the inner call goes on."""

    def forward(self, x):
        if x.numel() <= 1:
            if x.item() < 0:
                raise ValueError
            return x
        try:
            return self(x[: x.numel() // 2]) * 2
        except ValueError:
            return x.sum().reshape(1)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_calls_of_a_module_that_calls_itself_pair_inputs_and_outputs(first):
    model = Halves()
    captured = HookManager(model).capture("", inputs=True)
    model(torch.tensor([first, 5.0, 6.0, 7.0]))
    found = {s.input.numel(): s.output.item() for s in captured}
    assert found == ({4: 4.0, 2: 2.0, 1: 1.0} if first > 0 else {4: 8.0, 2: 4.0})
    assert sorted(s.call for s in captured) == list(range(3 if first > 0 else 2))


class Countdown(nn.Module):
    """Calls itself twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, left=2):
        return self(x + 1, left - 1) * 2 if left else self.layer(x)


@pytest.mark.parametrize("port", ["input", "output", "grad_output", "grad_input"])
def test_each_call_of_a_root_that_calls_itself_has_its_number_in_one_pass(port):
    model, seen = Countdown(), []
    HookManager(model).observe(f":{port}", lambda t, p: seen.append((p.step, p.call)))
    for _ in range(2):
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert sorted(seen) == [(step, call) for step in range(2) for call in range(3)]


def test_calls_are_told_apart_where_several_passes_come_back_together(net, x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            return self.cell(self.cell(x))

    model, seen = Twice(), []
    hooks = HookManager(model)
    hooks.observe(["cell:grad_input", "cell:grad_output"], lambda g, p: seen.append((p.port, p.step, p.call)))
    given = torch.randn(2, 4, requires_grad=True)
    outs = [model(given) for _ in range(2)]
    outs[0].sum().backward()
    wanted = [(port, 0, call) for call in (1, 0) for port in ("grad_output", "grad_input")]
    assert seen == wanted


def test_each_port_of_a_parameter_counts_its_own_calls(net, x):
    seen = []
    HookManager(net).observe(
        ["head.bias:grad", "head.bias:accumulated_grad"], lambda g, p: seen.append((p.port, p.call))
    )
    loss = net(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert seen == [("grad", 0), ("accumulated_grad", 0), ("grad", 1), ("accumulated_grad", 1)]


def test_prepended_hooks_run_before_those_of_others_and_priority_still_holds(x):
    net, order = Net(), []
    net.head.register_forward_hook(lambda *a: order.append("theirs"))
    hooks = HookManager(net)
    hooks.add("head", lambda t, p: order.append("plain"))
    hooks.add("head", lambda t, p: order.append("high"), priority=5)
    hooks.add("head", lambda t, p: order.append("first"), prepend=True)
    net(x)
    assert order == ["high", "first", "theirs", "plain"]
    order.clear()
    net.head.register_forward_hook(lambda *a: order.append("theirs, prepended"), prepend=True)
    hooks.add("head", lambda t, p: order.append("newest"), prepend=True)
    net(x)
    assert order == ["high", "newest", "first", "theirs, prepended", "theirs", "plain"]
    hooks.remove_all()
    assert len(net.head._forward_hooks) == 2


def test_a_hook_is_a_context_and_its_options_may_change(net, x):
    with HookManager(net).observe("head", lambda t, p: None) as hook:
        hook.set_options(every=2)
        for _ in range(4):
            net(x)
        with pytest.raises(ConfigError, match="`raw` can't be changed"):
            hook.set_options(raw=True)
    assert hook.is_removed
    assert hook.calls == 2
    assert num_torch_hooks(net) == 0
