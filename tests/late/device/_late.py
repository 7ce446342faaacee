"""The device as torch and tests see it."""

from __future__ import annotations

import traceback
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.torchside import _devices

from ._build import COMPILER_FAILURE, load

__all__ = ["Event", "Late", "late", "there"]

_OURS = str(Path(gradwatch.__file__).parent)
_BROKEN = "device-side assert triggered"


class Event:
    """A point in the device's work, as `torch.cuda.Event` is one."""

    def __init__(self, **_: Any) -> None:
        self._at = 0

    def record(self, stream: Any = None) -> None:
        device = late()
        device.refuse_if_broken()
        self._at = device.module.enqueue()

    def query(self) -> bool:
        device = late()
        device.refuse_if_broken()
        return device.module.is_done(self._at)

    def synchronize(self) -> None:
        device = late()
        device.refuse_if_broken()
        if not device.module.is_done(self._at):
            device.waited("event wait")
            device.module.finish_until(self._at)


class Late:
    """What tests set and read.

    Attributes:
        counts: what made the host wait, by name, while `counting`: reads of an element, copies from and to pageable
            memory, indexing by masks and by positions on the host, kernels that read (`nonzero`, ...), waits for
            events. Only what gradwatch's own code led to: a user's loop may read what it likes.
        stacks: the frames of gradwatch that led to each, latest last.
        broken: whether the device has failed, as after an assert in a kernel: every event raises from then on.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.counts: Counter[str] = Counter()
        self.stacks: list[tuple[str, str]] = []
        self.broken = False
        self._mode = "quiet"
        module.on_wait(self._asked)

    # -- time

    def set_lag(self, ticks: int) -> None:
        """Let work take so many ticks from now on; what was queued before is done."""
        self.module.set_lag(ticks)

    def tick(self) -> None:
        """Let time pass: what was queued `lag` ticks ago is done."""
        self.module.tick()

    def finish(self) -> None:
        """Let all work that was queued be done."""
        self.module.finish()

    # -- what waits

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Count what makes the host wait."""
        yield from self._watch("count")

    @contextmanager
    def refusing(self) -> Iterator[Counter[str]]:
        """Raise where gradwatch makes the host wait; waits for events are counted only."""
        yield from self._watch("refuse")

    def _watch(self, mode: str) -> Iterator[Counter[str]]:
        self.reset()
        self._mode = mode
        self.module.watch(True)
        try:
            yield self.counts
        finally:
            self._mode = "quiet"
            self.module.watch(False)

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts.clear()
        self.stacks.clear()
        self.module.reset()

    def _asked(self, what: str) -> str:
        if not self._note(what) or self._mode != "refuse":
            return ""
        return f"the late device refuses to make the host wait: {what}"

    def waited(self, what: str) -> None:
        """Take notice of a wait that is told from Python."""
        if self._mode != "quiet":
            self._note(what)

    def _note(self, what: str) -> bool:
        frames = traceback.extract_stack()[:-2]
        ours = [f for f in frames if f.filename.startswith(_OURS)]
        if not ours:
            return False
        self.counts[what] += 1
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours[-8:]))
        self.stacks.append((what, where))
        return True

    # -- what it costs

    @property
    def launches(self) -> int:
        """Kernels and copies since `reset`; a `_foreach_` kernel counts once."""
        return self.module.launches()

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels by name, while counting."""
        return self.module.kernels()

    @property
    def bytes_read(self) -> int:
        """Bytes copied to the host since `reset`."""
        return self.module.bytes_read()

    @property
    def memory(self) -> int:
        """Bytes held by tensors on the device now."""
        return self.module.memory()[0]

    @property
    def peak(self) -> int:
        """The most bytes held since `reset`."""
        return self.module.memory()[1]

    # -- what it can't do

    @contextmanager
    def without_float64(self) -> Iterator[None]:
        """Refuse float64, as MPS does."""
        self.module.no_double(True)
        _devices._probed.cache_clear()
        try:
            yield
        finally:
            self.module.no_double(False)
            _devices._probed.cache_clear()

    def refuse_if_broken(self) -> None:
        """Raise as every call of a failed device does."""
        if self.broken:
            raise RuntimeError(_BROKEN)


@cache
def late() -> Late:
    """Return the device; registers it with torch, once a process.

    Raises:
        RuntimeError: no compiler could make it.
    """
    module = load()
    if module is None:
        raise RuntimeError("the late device needs a C++ compiler")
    torch.utils.rename_privateuse1_backend("late")
    torch._register_device_module("late", _torch_late(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return Late(module)


def there() -> Late:
    """Return the device as a test finds it: numbers arrive at once, nothing is counted.

    Skips the test where it can't be had.
    """
    if load() is None:
        pytest.skip(f"needs the late device: {' '.join(COMPILER_FAILURE)[:200]}")
    device = late()
    device.set_lag(0)
    device.broken = False
    return device


def _torch_late(module: Any) -> types.ModuleType:
    found: Any = types.ModuleType("torch.late")
    found.Event = Event
    found.is_available = lambda: True
    found.is_initialized = lambda: True
    found.device_count = lambda: 2
    found.current_device = module.current_device
    found.set_device = lambda device: module.set_device(torch.device(device).index if device != "late" else 0)
    found.synchronize = lambda device=None: module.finish()
    found.manual_seed_all = lambda seed: None
    found.get_rng_state = lambda device="late": torch.get_rng_state()
    found.set_rng_state = lambda state, device="late": None
    found.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    found._is_in_bad_fork = lambda: False
    return found
