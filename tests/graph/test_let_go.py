"""Nothing is kept alive: what a user lets go of is gone, with what it held."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.errors import HookError
from gradwatch.hooks import HookManager


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def made(manager: HookManager, kind: str) -> Any:
    return manager.capture("*:output") if kind == "capture" else manager.profile()


@pytest.mark.parametrize("kind", ["capture", "profile"])
def test_a_capture_or_profile_that_was_dropped_is_gone_with_its_hooks(kind: str) -> None:
    model = net()
    with HookManager(model) as manager:
        for is_closed in (True, False):
            dropped = made(manager, kind)
            model(torch.ones(1, 3)).sum().backward()
            if is_closed:
                dropped.close() if kind == "capture" else dropped.stop()
            gone = weakref.ref(dropped)
            del dropped
            gc.collect()
            assert gone() is None
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert len(manager._on_close) <= 1


def test_a_capture_to_disk_goes_on_without_being_kept(tmp_path: Any) -> None:
    model = net()
    with HookManager(model) as manager:
        manager.capture("0:output", store=tmp_path / "store")
        gc.collect()
        model(torch.ones(1, 3))
    assert any((tmp_path / "store").iterdir())


@pytest.mark.parametrize("on_error", ["raise", "disable"])
def test_a_hook_that_failed_holds_no_tensor(on_error: str) -> None:
    model, outputs = net(), []

    def fails(tensor: Tensor, point: Any) -> None:
        outputs.append(weakref.ref(tensor))
        raise ValueError("mine")

    with HookManager(model) as manager:
        hook = manager.add("0:output", fails, on_error=on_error)
        if on_error == "raise":
            with pytest.raises(HookError):
                model(torch.ones(1, 3))
        else:
            with pytest.warns(match="mine"):
                model(torch.ones(1, 3))
        gc.collect()
        assert hook.error is not None
        assert outputs[0]() is None


def interrupted(watch: Watch, model: nn.Module) -> Tensor:
    output: Tensor = model(torch.ones(1, 3))
    output.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        output.sum().backward()
    return output


@pytest.mark.parametrize("end", [lambda watch, model: model(torch.ones(1, 3)), interrupted])
@pytest.mark.parametrize("autopsy", [False, True])
def test_a_forward_without_its_backward_holds_nothing(end: Callable[..., Tensor], autopsy: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, activations_every=1, autopsy=autopsy) as watch:
        for _ in range(2):
            gone = weakref.ref(end(watch, model))
            gc.collect()
            assert gone() is None
            model(torch.ones(1, 3)).sum().backward()
            watch.step()
            assert not watch.session.engine._replays


def test_a_replay_holds_inputs_without_the_graph_they_came_of() -> None:
    maker, model = nn.Linear(3, 3), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, autopsy=True) as watch:
        hidden = maker(torch.ones(1, 3)).exp()
        gone = weakref.ref(hidden)
        model(hidden).sum().backward()
        del hidden
        gc.collect()
        assert gone() is None
        watch.step()


def test_micro_batches_of_a_step_are_all_there_to_run_again_and_gone_with_it() -> None:
    model = net()
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), autopsy=True) as watch:
        engine = watch.session.engine
        for count in (1, 2):
            model(torch.ones(1, 3)).sum().backward()
            engine.finish_step()  # a trainer says so after each micro-batch
            engine.before_forward(0)
            assert len(engine._replays) == count
        watch.after_backward()
        engine.finish_step()
        assert not engine._replays


def test_losses_whose_backward_never_came_go_with_the_next_micro_batch() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, conflicts_every=1) as watch:
        tasks = watch.session.tasks
        assert tasks is not None
        output = model(torch.ones(1, 3))
        gone = weakref.ref(output)
        tasks.tasks.begin({"a": output[0, 0].square(), "b": output[0, 1].exp()})
        del output
        watch.session.before_forward(0)
        assert not tasks.tasks._pending
        assert gone() is None
