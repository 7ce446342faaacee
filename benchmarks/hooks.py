"""What a hook costs: increments over a bare module, all arms interleaved in one run, medians.

    python benchmarks/hooks.py [--quick | --reads]

With `--reads` it tells what each thing costs that an observer's call asks for. The first table hooks each of 50 small
Linear layers (so that what a hook itself costs shows), and gives microseconds per module call. The second runs a model
of the size of GPT-2 small. Times are processor time of this thread, which other programs on the machine disturb less
than the clock on the wall.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import timeit
from sys import getrefcount

import torch
from torch import nn

from gradwatch.hooks import HookManager, Observer
from gradwatch.torchside import graph_task_id

LAYERS = 50
TARGETS = {
    "forward observer": 1.4,
    "disabled": 1.1,
    "backward observer": 1 / 3,
}


def chain():
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(LAYERS)])


def forward_of(model, x):
    def run():
        with torch.no_grad():
            model(x)

    return run


def both_of(model, x):
    def run():
        model(x).sum().backward()

    return run


def both_of_sequences(model, x):
    """Of a batch of sequences: a Linear's output is then a view, which takes a second hook, on the view's base."""
    return both_of(model, x.detach().reshape(2, 2, 8).requires_grad_())


def with_hooks(attach):
    model = chain()
    return model, attach(model)


def ours(fn, port="output", *, disabled=False):
    def attach(model):
        hooks = HookManager(model)
        hook = hooks.add("re:\\d+", fn, port=port)
        if disabled:
            hook.disable()
        return hooks

    return attach


def nothing(*_):
    return None


ARMS = {
    "bare": (lambda model: None, forward_of),
    "empty torch forward hook": (lambda model: [m.register_forward_hook(nothing) for m in model], forward_of),
    "forward observer": (ours(Observer(nothing)), forward_of),
    "plain function": (ours(nothing), forward_of),
    "disabled": (ours(nothing, disabled=True), forward_of),
    "bare, backward": (lambda model: None, both_of),
    "torch full backward hook": (lambda model: [m.register_full_backward_hook(nothing) for m in model], both_of),
    "backward observer": (ours(Observer(nothing), "grad_output"), both_of),
    "bare, backward of sequences": (lambda model: None, both_of_sequences),
    "torch full backward hook, sequences": (
        lambda model: [m.register_full_backward_hook(nothing) for m in model],
        both_of_sequences,
    ),
    "backward observer, sequences": (ours(Observer(nothing), "grad_output"), both_of_sequences),
}


def interleaved(runs, rounds, repeats):
    """Return the median seconds of each run; in every round all take their turn, in a new order."""
    times = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    gc.disable()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = time.thread_time()
            for _ in range(repeats):
                runs[name]()
            times[name].append((time.thread_time() - start) / repeats)
        gc.collect(0)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def per_hook(rounds):
    x = torch.randn(4, 8)
    needs_grad = torch.randn(4, 8, requires_grad=True)
    kept, runs = [], {}
    for name, (attach, run) in ARMS.items():
        model, handles = with_hooks(attach)
        kept.append(handles)
        runs[name] = run(model, x if run is forward_of else needs_grad)
    seconds = interleaved(runs, rounds, repeats=3)
    micro = {name: value / LAYERS * 1e6 for name, value in seconds.items()}
    print(f"{'per module call':36} {'us':>8} {'increment':>10} {'ratio':>7}  target")
    found = {}
    for name, value in micro.items():
        kind = ("bare", "empty torch forward hook")
        if "backward" in name:
            kind = ("bare, backward", "torch full backward hook")
        if "sequences" in name:
            kind = ("bare, backward of sequences", "torch full backward hook, sequences")
        bare = micro[kind[0]]
        unit = micro[kind[1]] - bare
        found[name] = (value - bare) / unit
        target = f"<= {TARGETS[name]:.2f}" if name in TARGETS else ""
        print(f"{name:36} {value:8.2f} {value - bare:+10.2f} {found[name]:7.2f}  {target}")
    return found


def what_reads_cost():
    """Print the least nanoseconds of each read that a call of an observer makes, and which law needs it."""
    tensor, kept = torch.randn(4, 8), object()
    reads = {
        "tensor._version, which is read twice: it changes nothing": lambda: tensor._version,
        "graph_task_id(): a repeated forward is not shown": graph_task_id,
        "is_grad_enabled(): it records no graph": torch.is_grad_enabled,
        "getrefcount(point): a point may be kept": lambda: getrefcount(kept),
        "the function itself": lambda: nothing(tensor, kept),
    }
    nil = min(timeit.repeat(lambda: None, number=100_000, repeat=15)) * 1e4
    for name, read in reads.items():
        cost = min(timeit.repeat(read, number=100_000, repeat=15)) * 1e4
        is_call = name[0] in "gi"  # called as it is; the others within a function, whose call is taken off
        print(f"{cost - (0 if is_call else nil):6.0f} ns  {name}")
    print(f"{nil:6.0f} ns  for a call of a Python function that does nothing")


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.act, self.out = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.proj(mixed)
        return x + self.out(self.act(self.fc(self.ln_2(x))))


class Gpt2Small(nn.Module):
    """The size of GPT-2 small: 12 blocks, width 768, 12 heads, 50,257 tokens."""

    def __init__(self, depth=12, width=768, heads=12, vocabulary=50257):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.h = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def by_hand(model, tokens, *, clone):
    """What one would write: a forward hook on every module that keeps its output in a dict."""
    cache, handles = {}, []
    for name, module in model.named_modules():

        def keep(module, args, output, name=name):
            cache[name] = output.detach().clone() if clone else output.detach()

        handles.append(module.register_forward_hook(keep))
    try:
        output = model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return output, cache


def cache_cost(rounds):
    torch.manual_seed(0)
    model = Gpt2Small().eval()
    tokens = torch.randint(50257, (1, 64))
    hooks = HookManager(model)

    def no_grad(fn):
        def run():
            with torch.no_grad():
                fn()

        return run

    runs = {
        "bare": no_grad(lambda: model(tokens)),
        "hand-written hooks, clone": no_grad(lambda: by_hand(model, tokens, clone=True)),
        "run_with_cache": no_grad(lambda: hooks.run_with_cache(tokens, points="*:output")),
        "hand-written hooks, no clone": no_grad(lambda: by_hand(model, tokens, clone=False)),
        "run_with_cache(clone=False)": no_grad(lambda: hooks.run_with_cache(tokens, points="*:output", clone=False)),
    }
    seconds = interleaved(runs, rounds, repeats=1)
    print(f"\n{'GPT-2 small, 64 tokens':30} {'ms':>8} {'of bare':>8}")
    for name, value in seconds.items():
        print(f"{name:30} {value * 1e3:8.1f} {value / seconds['bare']:8.2f}")
    ratio = seconds["run_with_cache"] / seconds["hand-written hooks, clone"]
    print(f"run_with_cache / hand-written: {ratio:.3f}  (target <= 1.15)")
    plain = seconds["run_with_cache(clone=False)"] / seconds["hand-written hooks, no clone"]
    print(f"the same without clones:       {plain:.3f}")
    return ratio


def many_points(rounds):
    """A run with hooks at 1,000 modules against the same hooks written by hand, put on and taken off each time."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(1000)]).eval()
    x = torch.randn(128, 256)
    hooks = HookManager(model)

    def written():
        handles = [module.register_forward_hook(nothing) for module in model]
        try:
            return model(x)
        finally:
            for handle in handles:
                handle.remove()

    def ours():
        return hooks.run_with_hooks(x, hooks=[("re:\\d+", nothing)])

    with torch.no_grad():
        seconds = interleaved({"bare": lambda: model(x), "hand-written": written, "run_with_hooks": ours}, rounds, 1)
    print("\n1,000 points, one run:", ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items()))
    ratio = seconds["run_with_hooks"] / seconds["hand-written"]
    print(f"run_with_hooks / hand-written: {ratio:.3f}  (target <= 1.05)")
    return ratio


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few rounds, and the first table only")
    parser.add_argument("--reads", action="store_true", help="what an observer's call asks for, read by read")
    given = parser.parse_args()
    quick = given.quick
    torch.set_num_threads(1)
    if given.reads:
        what_reads_cost()
        return
    per_hook(60 if quick else 300)
    if not quick:
        cache_cost(7)
        many_points(15)


if __name__ == "__main__":
    main()
