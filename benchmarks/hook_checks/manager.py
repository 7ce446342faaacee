"""HookManager: capture, monitoring, debug hooks, limits, cleanup, threads."""

import gc
import threading
import warnings

import torch
from torch import nn

from gradwatch.errors import ConfigError, HookBreak
from gradwatch.hooks import HookManager, Observer, exceeds, scale

from ._base import by_hand, encoder, feature, gpt2, ids, mlp, net, raises, row, words, x

SOURCE = "HookManager"


def close(one, other):
    return abs(one - other) <= 1e-9 * max(abs(other), 1e-30) + 1e-12


@feature(SOURCE, "capture hook in+out with own id, layer idx")
def _():
    m = net()
    captured = HookManager(m).capture(4, inputs=True, outputs=True, id="mine")
    m(x())
    assert captured.hook.id == "mine"
    assert torch.equal(m.blocks[4](captured[-1].input), captured[-1].output)


@feature(SOURCE, "capture via module object")
def _():
    m = net()
    captured = HookManager(m).capture(m.head)
    assert torch.equal(m(x()), captured[-1].output)


@feature(SOURCE, "get captured states by id from the manager (h.captures[id])")
def _():
    hooks = HookManager(mlp())
    captured = hooks.capture("fc1", id="mine")
    assert hooks.captures["mine"] is captured


@feature(SOURCE, "clear by hook / all / by state id")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc*")
    m(row())
    assert captured.clear(captured[0].id) == 1
    assert captured.clear() == 1


@feature(SOURCE, "clear several captures at once / manager-wide")
def _():
    hooks = HookManager(mlp())
    one, two, three = (hooks.capture("fc1", id=name) for name in ("a", "b", "c"))
    hooks.model(row())
    assert hooks.clear_captures("a", "b") == 2
    assert (len(one), len(two), len(three)) == (0, 0, 1)
    assert hooks.clear_captures() == 1


@feature(SOURCE, "limit by count")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", max_states=2)
    for _ in range(5):
        m(row())
    assert (len(captured), captured.dropped) == (2, 3)


@feature(SOURCE, "limit by count per layer (max_states is over all together)")
def _():
    m = net()
    captured = HookManager(m).capture("blocks.?", max_states_per_module=2)
    for _ in range(5):
        m(x())
    assert [len(captured.of(f"blocks.{i}")) for i in range(6)] == [2] * 6


@feature(SOURCE, "limit by MB, exact; single state bigger than limit")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", memory_limit_mb=72 * 3 / 2**20)
    for _ in range(5):
        m(row())
    assert (len(captured), captured.num_bytes) == (3, 216)
    tight = HookManager(m).capture("fc1", memory_limit_mb=1 / 2**20)
    m(row())
    assert (len(tight), tight.dropped) == (0, 1)


@feature(SOURCE, "global memory limit over all captures")
def _():
    m = mlp()
    hooks = HookManager(m, capture_limit_mb=72 * 4 / 2**20)
    kept = [hooks.capture("fc1", id=name) for name in ("a", "b", "c")]
    for _ in range(5):
        m(row())
    assert sum(c.num_bytes for c in kept) == 72 * 4


@feature(SOURCE, "cleanup_interval")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", max_states=1, cleanup_interval=2)
    for _ in range(5):
        m(row())
    assert captured.dropped == 4


@feature(SOURCE, "age limit: drop states older than n steps/seconds")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", max_age=2)
    for _ in range(6):
        m(row())
    assert [s.step for s in captured] == [3, 4, 5]


@feature(SOURCE, "capture every n / when (sampling)")
def _():
    m = mlp()
    every = HookManager(m).capture("fc1", every=3)
    where = HookManager(m).capture("fc*", when=lambda p: p.path == "fc2")
    for _ in range(6):
        m(row())
    assert [s.step for s in every] == [0, 3]
    assert {s.path for s in where} == {"fc2"}


@feature(SOURCE, "capture gradient states")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", gradients=True)
    m(row()).sum().backward()
    assert torch.allclose(captured[-1].grad_output.sum(0), m.fc1.bias.grad)
    assert torch.equal(captured[0].output, m.fc1(row()))
    alone = HookManager(m).capture("fc2:grad_output")
    m(row()).sum().backward()
    assert torch.equal(alone[-1].grad_output, torch.ones(3, 2))


@feature(SOURCE, "capture kwargs inputs HF gpt2 block; call dict")
def _():
    m = gpt2()
    captured = HookManager(m).capture("transformer.h.0:input")
    m(ids())
    assert captured[-1].input["0"].shape == (1, 6, 32)
    assert len(captured[-1].input) > 1


@feature(SOURCE, "threads: 4 threads forward, capture counts right, states not mixed")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1", inputs=True)
    in_threads(4, lambda i: [m(row() * i) for _ in range(5)])
    assert len(captured) == 20
    assert all(torch.equal(m.fc1(s.input), s.output) for s in list(captured))


def in_threads(n, fn):
    wrong = []

    def run(i):
        try:
            fn(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


@feature(SOURCE, "threads: run_with_cache in parallel threads each own cache")
def _():
    m, found = mlp(), {}
    hooks = HookManager(m)
    in_threads(3, lambda i: found.setdefault(i, hooks.run_with_cache(row() * i)[1]))
    assert all(torch.equal(found[i]["fc1"], m.fc1(row() * i)) for i in range(3))


@feature(SOURCE, "threads: run_with_hooks interventions isolated")
def _():
    m, found = mlp(), {}
    hooks = HookManager(m)
    in_threads(3, lambda i: found.setdefault(i, hooks.run_with_hooks(row(), hooks=[("fc2", lambda t, p: t * i)])))
    assert all(torch.equal(found[i], m(row()) * i) for i in range(3))


@feature(SOURCE, "threads: add/remove while another runs forward")
def _():
    m = mlp()
    hooks = HookManager(m)
    in_threads(
        2, lambda i: [hooks.observe("fc1", print, when=lambda p: False).remove() if i else m(row()) for _ in range(30)]
    )
    assert not m.fc1._forward_hooks


@feature(SOURCE, "monitor: mean/std/rms/absmax/zeros exact vs torch.float64")
def _():
    m = nn.Sequential(nn.Linear(4, 50), nn.ReLU())
    monitor = HookManager(m).monitor("1")
    t = m(row()).double()
    s = monitor["1:output"]
    assert close(s.mean, t.mean().item())
    assert close(s.std, t.std(correction=0).item())
    assert close(s.rms, t.square().mean().sqrt().item())
    assert (s.absmax, s.zero_fraction) == (t.abs().max().item(), (t == 0).double().mean().item())


@feature(SOURCE, "monitor: big offset cancellation mean=1e6 std=1e-3 (fp32)")
def _():
    m, monitor_of = nn.Identity(), None
    monitor_of = HookManager(m).monitor(":output")
    parts = [1e6 + 0.1 * torch.randn(500, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for part in parts:
        m(part)
    wanted = torch.cat(parts).double().std(correction=0).item()
    assert abs(monitor_of[":output"].std / wanted - 1) < 1e-6


@feature(SOURCE, "monitor custom metrics=")
def _():
    m = mlp()
    monitor = HookManager(m).monitor("fc1", metrics={"l1": lambda t: t.abs().mean()})
    m(row())
    assert abs(monitor["fc1:output"].metrics["l1"] - m.fc1(row()).abs().mean().item()) < 1e-6


@feature(SOURCE, "monitor: reset, merge, over time (history/per step)")
def _():
    m = mlp()
    monitor = HookManager(m).monitor("fc1", history=3)
    for k in range(5):
        m(row() * k)
    series = monitor.over_time("fc1:output")
    assert [step for step, _ in series] == [2, 3, 4]
    assert series[0][1].absmax < series[2][1].absmax
    assert monitor.merge(monitor)["fc1:output"].count == 2 * monitor["fc1:output"].count
    monitor.reset()
    assert len(monitor) == 0


@feature(SOURCE, "monitor in with-block / stop")
def _():
    m = mlp()
    with HookManager(m).monitor("fc1") as monitor:
        m(row())
    m(row())
    assert monitor["fc1:output"].calls == 1


@feature(SOURCE, "performance metrics / resources: profile memory")
def _():
    m = mlp()
    with HookManager(m).profile() as profile:
        m(row())
    assert abs(profile["fc1"].activation_mb * 2**20 - 3 * 6 * 4) < 1e-6


@feature(SOURCE, "conditional breakpoint: own condition, per point; reset; every")
def _():
    m = mlp()
    hook = HookManager(m).break_when("fc*", lambda t, p: p.path == "fc2", every=2)
    assert raises(HookBreak, m, row()).point.path == "fc2"
    m(row())
    hook.reset()
    raises(HookBreak, m, row())


@feature(SOURCE, "break on gradient during backward: HookBreak comes out; grads state")
def _():
    m = mlp()
    HookManager(m).break_when("fc1:grad_output", exceeds(0.0))
    error = raises(HookBreak, m(row()).sum().backward)
    assert error.point.port == "grad_output"
    assert m.fc1.weight.grad is None


@feature(SOURCE, "break with number of hits > 1 (every time / first n)")
def _():
    m, seen = mlp(), []
    HookManager(m).break_when("fc1", exceeds(0.0), action=seen.append, times=3)
    for _ in range(5):
        m(row())
    assert len(seen) == 3


@feature(SOURCE, "gradient-flow analysis: ready-made")
def _():
    m = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    for layer in m:
        layer.weight.data = torch.eye(4) * 0.1
    with HookManager(m).gradient_flow("re:\\d+:grad_output") as flow:
        m(row()).sum().backward()
    assert all(abs(ratio - 0.1) < 1e-6 for ratio in flow.ratios().values())
    assert list(flow.sizes()) == ["3:grad_output", "2:grad_output", "1:grad_output", "0:grad_output"]


@feature(SOURCE, "enable_intervention=False: forbid changes manager-wide")
def _():
    hooks = HookManager(mlp(), read_only=True)
    raises(ConfigError, hooks.add, "fc1", scale(0.0))
    raises(ConfigError, hooks.run_with_hooks, row(), hooks=[("fc1", scale(0.0))])
    hooks.add("fc1", Observer(lambda t, p: None))
    assert len(hooks.run_with_cache(row(), points="fc1")[1]) == 1


@feature(SOURCE, "resource: registering captures on nn.MultiheadAttention (tuple out)")
def _():
    m = encoder()
    captured = HookManager(m).capture("layers.0.self_attn", inputs=True)
    m(words())
    assert captured[-1].output is not None
    assert captured[-1].input is not None


@feature(SOURCE, "capture on exception mid-forward: pending state leaks into next")
def _():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.wrong = nn.Linear(4, 4), False

        def forward(self, x):
            if self.wrong:
                raise ValueError
            return self.fc(x)

    m = Fails()
    captured = HookManager(m).capture("", inputs=True)
    m.wrong = True
    raises(ValueError, m, row())
    m.wrong = False
    m(row() * 2)
    assert torch.equal(captured[-1].input, row() * 2)
    assert len(captured) == 1


class Recursive(nn.Module):
    def forward(self, x):
        return x if x.numel() <= 1 else self(x[: x.numel() // 2]) * 2


@feature(SOURCE, "capture of recursion (module calling itself): input of right call")
def _():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Recursive()

        def forward(self, x):
            return self.inner(x)

    m = Root()
    captured = HookManager(m).capture("inner", inputs=True)
    m(torch.arange(4.0) + 1)
    found = {s.input.numel(): s.output.item() if s.output.numel() == 1 else None for s in captured}
    assert found == {4: 4.0, 2: 2.0, 1: 1.0}


_ = (by_hand, gc, warnings)
