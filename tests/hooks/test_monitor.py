"""Monitors, breakpoints, profiles, coverage."""

import builtins
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.errors import ConfigError, HookBreak, UnknownNameError
from gradwatch.hooks import HookManager, dead, exceeds, non_finite

from .conftest import num_torch_hooks


def test_statistics_equal_those_of_all_that_passed(net, x):
    hooks = HookManager(net)
    monitor = hooks.monitor("blocks.0.mlp.1:output")
    seen = []
    hooks.add("blocks.0.mlp.1:output", lambda t, p: seen.append(t.detach().double().clone()))
    for k in (1.0, 5.0, -3.0):
        net(x * k)
    together = torch.cat([t.flatten() for t in seen])
    found = monitor["blocks.0.mlp.1:output"]
    assert (found.count, found.calls, found.nonfinite) == (together.numel(), 3, 0)
    assert found.mean == pytest.approx(together.mean().item())
    assert found.std == pytest.approx(together.std(correction=0).item())
    assert found.rms == pytest.approx(together.square().mean().sqrt().item())
    assert found.absmax == together.abs().max().item()
    assert found.zero_fraction == (together == 0).double().mean().item()
    assert "blocks.0.mlp.1:output" in monitor.table()


def test_monitors_merge_as_if_one_had_seen_everything(net, x):
    hooks = HookManager(net)
    whole = hooks.monitor("*:output")
    first, second = hooks.monitor("*:output"), hooks.monitor("*:output")
    second.hook.disable()
    net(x)
    first.hook.disable()
    second.hook.enable()
    net(2 * x)
    both = first.merge(second)
    assert set(both) == set(whole)
    for name, wanted in whole.items():
        assert both[name].count == wanted.count
        assert both[name].std == pytest.approx(wanted.std)
    loaded = hooks.monitor("head")
    loaded.load_state_dict(whole.state_dict())
    assert dict(loaded) == dict(whole)


def test_non_finite_values_show_and_are_counted():
    model = nn.Identity()
    hooks = HookManager(model)
    monitor = hooks.monitor(":output")
    model(torch.tensor([1.0, float("inf"), float("nan")]))
    found = monitor[":output"]
    assert found.nonfinite == 2
    assert math.isnan(found.mean)
    assert math.isnan(found.absmax)
    with pytest.raises(UnknownNameError, match="monitored point that has fired"):
        monitor["other:output"]
    monitor.hook.reset()
    assert len(monitor) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_monitor_takes_all_dtypes_and_big_values(dtype):
    model = nn.Identity()
    monitor = HookManager(model).monitor(":output")
    model(torch.full((100,), 300).to(dtype))
    assert monitor[":output"].rms == (1 if dtype == torch.bool else 300)


def test_monitor_reads_nothing_back_from_the_device():
    model = nn.Identity()
    monitor = HookManager(model).monitor(":output")
    model(torch.ones(3, device="meta"))  # any host read would raise
    assert monitor._sums[":output"].calls == 1


def test_break_when_stops_the_first_time_with_tensor_point_and_step(net, x):
    hooks = HookManager(net)
    hook = hooks.break_when("blocks.?:output", exceeds(50.0), id="big")
    net(x)
    with pytest.raises(HookBreak) as caught:
        net(x * 1e4)
    stop = caught.value
    assert str(stop) == "hook 'big': exceeds(50) held at 'blocks.0:output', step 1, call 0"
    assert stop.tensor.abs().max() > 50
    assert (stop.point.path, stop.point.step, stop.hook_id) == ("blocks.0", 1, "big")
    net(x * 1e4)  # quiet after the first
    assert hook.fn.hit is stop
    hook.reset()
    with pytest.raises(HookBreak):
        net(x * 1e4)


def test_break_conditions():
    assert non_finite(torch.tensor([1.0, float("nan")]))
    assert not non_finite(torch.tensor([1, 2]))
    assert exceeds(1.0)(torch.tensor([-2.0]))
    assert exceeds(1.0)(torch.tensor([float("nan")]))
    assert not exceeds(1.0)(torch.tensor([1.0]))
    assert dead(torch.zeros(2))
    assert not dead(torch.zeros(0))
    with pytest.raises(ConfigError):
        exceeds(float("nan"))


def test_break_in_backward_and_by_action(net, x, monkeypatch):
    hooks = HookManager(net)
    hooks.break_when("embed:grad_output", dead)
    with pytest.raises(HookBreak, match="dead held at 'embed:grad_output'"):
        (net(x).sum() * 0).backward()
    found = []
    hooks.break_when("head", non_finite, action=found.append)
    net(x * float("nan"))
    assert found[0].point.path == "head"
    entered = []
    monkeypatch.setattr(sys, "breakpointhook", lambda *a, **k: entered.append(1))
    assert builtins.breakpoint
    hooks.break_when("head", non_finite, action="debugger")
    net(x * float("nan"))
    assert entered == [1]
    with pytest.raises(ConfigError, match="`action` is 'raise', 'debugger' or a function"):
        hooks.break_when("head", dead, action="print")


class Slow(nn.Module):
    def __init__(self, layer, seconds):
        super().__init__()
        self.layer, self.seconds = layer, seconds

    def forward(self, x):
        return _Wait.apply(self.layer(x), self.seconds)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        import time

        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        import time

        time.sleep(2 * ctx.seconds)
        return grad, None


def test_profile_times_forward_and_backward_of_nested_modules():
    model = nn.Sequential(Slow(nn.Linear(4, 4), 0.0), Slow(nn.Linear(4, 4), 0.02), nn.ReLU(inplace=True))
    hooks = HookManager(model)
    with hooks.profile() as profile:
        for _ in range(2):
            model(torch.randn(3, 4)).sum().backward()
    assert num_torch_hooks(model) == 0
    by_path = {m.path: m for m in profile}
    slow = by_path["1"]
    assert slow.calls == 2
    assert slow.forward_ms >= 40
    assert slow.forward_self_ms >= 39
    assert slow.backward_ms >= 80
    assert by_path[""].forward_ms >= slow.forward_ms
    assert by_path[""].forward_self_ms < by_path[""].forward_ms
    assert by_path[""].backward_ms >= slow.backward_ms
    assert by_path["1.layer"].backward_ms < 40  # the wait is its parent's
    assert by_path["0.layer"].activation_mb == pytest.approx(2 * 3 * 4 * 4 / 2**20)
    assert by_path["2"].activation_mb == 0  # in place: no memory of its own
    assert profile["1"].type == "Slow"


def test_profile_table_and_chrome_trace(net, x, tmp_path):
    hooks = HookManager(net)
    with hooks.profile() as profile:
        net(x).sum().backward()
    lines = profile.table().splitlines()
    assert lines[1].startswith("(model)")
    assert any(line.startswith("    attn") or "  blocks.0.attn" in line for line in lines)
    assert len(profile.table(sort="backward_ms", top=3).splitlines()) == 4
    with pytest.raises(UnknownNameError, match="there is no column"):
        profile.table(sort="speed")
    profile.save_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["cat"] for e in events} == {"forward", "backward"}
    assert all(e["ph"] == "X" and e["dur"] >= 0 for e in events)
    root = next(e for e in events if e["name"] == "(model)" and e["cat"] == "forward")
    inside = [e for e in events if e["cat"] == "forward"]
    assert all(root["ts"] <= e["ts"] and e["ts"] + e["dur"] <= root["ts"] + root["dur"] for e in inside)


def test_profile_knows_recomputation_and_survives_errors(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed()
    hooks = HookManager(model)
    with hooks.profile() as profile:
        model(x).sum().backward()
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 9))
        model(x).sum().backward()
    body = profile["body.0"]
    assert body.recompute_ms > 0
    assert profile[""].depth == 0
    assert num_torch_hooks(model) == 0


def test_coverage_tells_what_fired_and_why_others_did_not(net, x):
    net.unused = nn.Linear(2, 2)
    hooks = HookManager(net)
    hooks.add("head", print, id="off").disable()
    hooks.observe("head", lambda t, p: None, id="on")
    hooks.observe("unused", lambda t, p: None, id="uncalled")
    hooks.observe("head:grad_output", lambda t, p: None, id="no backward")
    hooks.observe("head", lambda t, p: None, id="never", when=lambda p: False)
    hooks.observe("head", lambda t, p: None, id="leaf", leaf="7")
    hooks.observe("head.weight:grad", lambda t, p: None, id="parameter")
    net(x)
    coverage = hooks.coverage()
    kinds = {entry.hook_id: entry.kind for entry in coverage}
    assert kinds == {
        "off": "disabled",
        "on": "fired",
        "uncalled": "never called",
        "no backward": "no gradient",
        "never": "condition",
        "leaf": "output type",
        "parameter": "no gradient",
    }
    assert not coverage.is_complete
    assert len(coverage.silent) == 6
    assert "no backward has reached it" in str(coverage)


def test_coverage_names_an_output_without_tensors():
    class Text(nn.Module):
        def forward(self, x):
            return "done"

    model = Text()
    hooks = HookManager(model)
    hooks.observe(":output", lambda t, p: None)
    model(torch.ones(1))
    assert hooks.coverage()[0].reason == "it holds no tensor: str"
