"""A watch may be closed, or let go of, by anybody's hook in the midst of a walk of torch's: the step goes on."""

import gc

import pytest
import torch
from torch import nn

from gradwatch import Watch

HOOKS = {
    "before the model": lambda model, optimizer, fn: model.register_forward_pre_hook(fn),
    "after the model": lambda model, optimizer, fn: model.register_forward_hook(fn),
    "before a module": lambda model, optimizer, fn: model[1].register_forward_pre_hook(fn),
    "after a module": lambda model, optimizer, fn: model[1].register_forward_hook(fn),
    "first after a module": lambda model, optimizer, fn: model[1].register_forward_hook(fn, prepend=True),
    "backward": lambda model, optimizer, fn: model[1].register_full_backward_hook(fn),
    "gradient": lambda model, optimizer, fn: model[0].weight.register_hook(fn),
    "gradient, accumulated": lambda model, optimizer, fn: model[0].weight.register_post_accumulate_grad_hook(fn),
    "before the step": lambda model, optimizer, fn: optimizer.register_step_pre_hook(fn),
    "after the step": lambda model, optimizer, fn: optimizer.register_step_post_hook(fn),
}


def trained(hook, ending, *, is_first, num_steps=6):
    """Train with a watch that somebody's hook ends in the fourth step; return model, optimizer and number of calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    box, calls = {}, []

    def end(*_):
        calls.append(len(calls))
        if box.get("is due") and "watch" in box:
            watch = box.pop("watch")
            if ending == "closed":
                watch.close()
            del watch
            gc.collect()

    if is_first:
        HOOKS[hook](model, optimizer, end)
    if ending != "none":
        options = {"activations_every": 1, "updates_every": 1, "local_norms": True, "autopsy": True}
        box["watch"] = Watch(model, optimizer, rules="autoclip", **options)
    if not is_first:
        HOOKS[hook](model, optimizer, end)
    for step in range(num_steps):
        box["is due"] = step == 3
        loss = model(torch.full((2, 4), 1.0 + step)).square().mean()
        loss.backward()
        if "watch" in box and step < 3:
            box["watch"].step(loss=loss)
        else:
            optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, calls


def all_hooks(model, optimizer):
    places = [*model.modules(), *model.parameters(), optimizer]
    tables = [getattr(p, name, None) for p in places for name in dir(p) if name.endswith("_hooks")]
    return sum(len(table) for table in tables if isinstance(table, dict))


@pytest.mark.parametrize("is_first", [True, False], ids=["hung-before", "hung-after"])
@pytest.mark.parametrize("ending", ["closed", "let go of"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_watch_that_a_hook_ends_leaves_the_step_as_it_is_and_nothing_behind(hook, ending, is_first):
    bare, bare_optimizer, bare_calls = trained(hook, "none", is_first=is_first)
    model, optimizer, calls = trained(hook, ending, is_first=is_first)
    assert calls == bare_calls
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    if is_first or "step" not in hook:  # behind it lies the user's own: torch can't be told in the midst of its walk
        assert all_hooks(model, optimizer) == all_hooks(bare, bare_optimizer)
