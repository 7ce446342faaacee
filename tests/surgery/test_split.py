"""`split` is the plain sum unless someone listens."""

from __future__ import annotations

import threading

import pytest
import torch

from gradwatch.errors import ConfigError
from gradwatch.treatments.surgery import Surgery, SurgeryController, collecting, split

from .conftest import TwoHeads, batches


def test_split_is_bitwise_the_sum_of_the_losses() -> None:
    a, b, c = (torch.tensor(v, requires_grad=True) for v in (0.1, 0.2, 0.3))
    assert torch.equal(split(a=a, b=b, c=c), a + b + c)


def test_split_reaches_the_innermost_collector_and_nobody_afterwards() -> None:
    model = TwoHeads()
    outer, inner = (SurgeryController(Surgery("pcgrad"), model.named_parameters()) for _ in range(2))
    a, b = model.losses(*batches()[0])
    with collecting(outer):
        with collecting(inner):
            split(a=a, b=b)
        assert set(inner._pending) == {"a", "b"}
        assert outer._pending == {}
    split(a=a, b=b)
    assert outer._pending == {}


def test_split_under_no_grad_is_not_a_task() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    with collecting(controller), torch.no_grad():
        a, b = model.losses(*batches()[0])
        split(a=a, b=b)
    assert controller._pending == {}


def test_split_in_another_thread_is_not_a_task() -> None:
    model = TwoHeads()
    controller = SurgeryController(Surgery("pcgrad"), model.named_parameters())
    a, b = model.losses(*batches()[0])
    with collecting(controller):
        thread = threading.Thread(target=split, kwargs={"a": a, "b": b})
        thread.start()
        thread.join()
    assert controller._pending == {}


def test_collecting_does_not_keep_a_controller_alive() -> None:
    controller = SurgeryController(Surgery("pcgrad"), TwoHeads().named_parameters())
    scope = collecting(controller)
    scope.__enter__()
    del controller
    model = TwoHeads()
    a, b = model.losses(*batches()[0])
    assert torch.equal(split(a=a, b=b), a + b)
    scope.__exit__(None, None, None)


def test_split_without_losses_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        split()
    assert str(caught.value) == ("split() needs the loss of each task by name: split(seg=seg_loss, depth=depth_loss).")
