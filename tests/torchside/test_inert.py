"""Hooks of ours leave nothing on copies and in files, and come off when their owner is gone."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.callbacks._backward_end import BackwardEnd
from gradwatch.hooks import HookManager
from gradwatch.torchside import WeakHook, is_owned
from gradwatch.treatments import at_grad_output

WITHOUT_GRADWATCH = """
import sys
sys.modules["gradwatch"] = None
import torch
for file in sys.argv[1:]:
    model = torch.load(file, weights_only=False)
    seen = []
    for _ in range(64):
        # Numbers of hooks begin at 0 here: one that meets a number left in the file would get keyword arguments.
        model[0].register_forward_hook(lambda module, args, output: seen.append(1))
        model[0].register_forward_pre_hook(lambda module, args: seen.append(1))
    model(torch.ones(2, 4)).sum().backward()
    assert len(seen) == 128
    assert model[0].weight.grad is not None
"""


class Owner:
    def __init__(self):
        self.calls = 0

    def see(self, *args):
        self.calls += 1


def hooks_on(model):
    """Entries in every dictionary of hooks, the notes beside them included."""
    return sum(
        len(hooks) for m in model.modules() for k, hooks in vars(m).items() if "hook" in k and isinstance(hooks, dict)
    )


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))


def with_manager(model):
    hooks = HookManager(model)
    for port in ("input", "output", "grad_output", "grad_input"):
        hooks.add(f"0:{port}", lambda tensor, point: None)
    hooks.add("2:output", lambda tensor, point: None)
    hooks.add("0.weight:grad", lambda tensor, point: None)
    hooks.add("0.bias:accumulated_grad", lambda tensor, point: None)
    return hooks, hooks.profile()


def with_watch(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"activations_every": 1, "local_norms": True, "autopsy": True, **options}
    watch = Watch(model, optimizer, rules="observe", **options)
    for _ in range(2):
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
    return watch


KINDS = [
    pytest.param(with_watch, id="watch"),
    pytest.param(lambda model: with_watch(model, backward="full"), id="watch-full"),
    pytest.param(with_manager, id="manager"),
    pytest.param(lambda model: at_grad_output(model, "*", lambda grad, scale: (grad, 1.0)), id="grad-output"),
    pytest.param(lambda model: BackwardEnd(model, print), id="backward-end"),
]


@pytest.mark.parametrize("hooked", KINDS)
def test_a_deep_copy_carries_nothing_and_the_original_keeps_all(hooked):
    model = net()
    held = hooked(model)
    before = hooks_on(model)
    for copied in (
        copy.deepcopy(model),
        copy.deepcopy({"a": [model]})["a"][0],
        torch.optim.swa_utils.AveragedModel(model),
    ):
        assert hooks_on(copied) == 0
        copied(torch.ones(2, 4)).sum().backward()
    assert before > 0
    assert hooks_on(model) == before
    del held


def test_a_saved_model_is_loaded_and_trained_where_there_is_no_gradwatch(tmp_path: Path):
    for number, kind in enumerate(KINDS):
        model = net()
        held = kind.values[0](model)
        assert hooks_on(model) > 0
        torch.save(model, tmp_path / f"{number}.pt")
        assert b"gradwatch" not in (tmp_path / f"{number}.pt").read_bytes()
        assert b"gradwatch" not in _saved(model, _use_new_zipfile_serialization=False)
        torch.load(io.BytesIO(_saved(model.state_dict())), weights_only=True)
        del held
    files = sorted(tmp_path.glob("*.pt"))
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_GRADWATCH, *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_a_hook_comes_off_when_its_owner_is_gone():
    model, owner = net(), Owner()
    for register in (model[0].register_forward_hook, model[0].register_forward_pre_hook, model.register_forward_hook):
        WeakHook.of(owner.see).hang(register, with_kwargs=True)
    model(torch.ones(2, 4))
    assert owner.calls == 3
    del owner
    assert hooks_on(model) == 0


def test_hooks_that_cannot_come_off_now_do_nothing_and_come_off_when_called():
    model, owner = net(), Owner()
    hook = WeakHook.of(owner.see)
    handle = hook.hang(model[0].register_forward_hook)
    place = handle.hooks_dict_ref()
    del owner
    place[handle.id] = hook  # as where the owner went while torch walked through the hooks
    assert torch.equal(model(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert hooks_on(model) == 0


def test_a_hook_that_keeps_its_owner_stays():
    model = net()
    at_grad_output(model, "0", lambda grad, scale: (grad * 2, 2.0))
    model(torch.ones(2, 4)).sum().backward()
    twice = model[0].bias.grad
    model[0]._forward_hooks.clear()
    model.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(twice, 2 * model[0].bias.grad)


def test_a_hook_in_front_stays_in_front():
    model, owner = net(), Owner()
    order = []
    model[0].register_forward_hook(lambda *_: order.append("user"))
    owner.see = lambda *_: order.append("ours")
    WeakHook(owner, lambda o, *_: o.see()).hang(model[0].register_forward_hook, prepend=True, with_kwargs=True)
    model(torch.ones(2, 4))
    assert order == ["ours", "user"]


def test_whose_a_hook_is_can_be_said_of_anything_that_is_one():
    class Touchy:
        """Raises when it is asked for anything."""

        def __getattr__(self, name):
            raise RuntimeError(name)

        def __call__(self, *_):
            return None

    model, owner = net(), Owner()
    model[0].register_forward_hook(Touchy())
    model[0].register_forward_hook(owner.see)
    WeakHook.of(owner.see).hang(model[0].register_forward_hook)
    hooks = HookManager(model)
    hooks.add("0:output", lambda tensor, point: None)
    assert [is_owned(hook) for hook in model[0]._forward_hooks.values()] == [False, False, True, True]
