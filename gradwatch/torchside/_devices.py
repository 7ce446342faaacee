"""What devices can do: which make the host wait, how numbers cross without a wait, which floats they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Mark",
    "accelerator",
    "allocated_bytes",
    "fetched",
    "give_back_memory",
    "home",
    "is_host",
    "mark",
    "moved",
    "random_state",
    "sent",
    "set_random_state",
    "wait_for",
    "wide_dtype",
]


class Mark(Protocol):
    """A point in a device's work."""

    def query(self) -> bool:
        """Return whether all work before it is done, without a wait."""

    def synchronize(self) -> None:
        """Wait for it."""


def is_host(device: torch.device) -> bool:
    """Return whether a tensor there can be read at once. Everywhere else a read waits for all work that was queued."""
    return device.type == "cpu"


def home(tensors: Iterable[Tensor]) -> torch.device:
    """Return where numbers about tensors of several devices are put together: the first device that is not the host.

    Sending to a device waits for nobody, and fetching from one does. The CPU where there is no other.
    """
    devices = [t.device for t in tensors]
    return next((d for d in devices if not is_host(d)), devices[0] if devices else torch.device("cpu"))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are kept in: float64, or float32 on devices without it (MPS, some of XPU)."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else _probed(device)


@cache
def _probed(device: torch.device) -> torch.dtype:
    # Tried and not looked up by name. A device may allocate what it can't compute, so a kernel is run; nobody reads it.
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return torch.float32
    return torch.float64


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host's tensor on a device, without making the host wait: from pinned memory where there is any."""
    if is_host(device):
        return tensor
    if device.type == "meta" or not _pins(device.type):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on another device, itself where it is there already; waits only on the way to the host.

    Args:
        tensor: of numbers.
        device: where to.
        dtype: in which floats; None: as it is, in float32 where the device has no float64.
    """
    if dtype is None:
        dtype = wide_dtype(device) if tensor.dtype is torch.float64 else tensor.dtype
    if tensor.device == device:
        return tensor.to(dtype)
    if is_host(tensor.device):
        return sent(tensor.to(dtype), device)
    return tensor.to(device, dtype, non_blocking=not is_host(device))


def fetched(tensor: Tensor) -> tuple[Tensor, Mark | None]:
    """Return a copy on the host, and the mark after which it holds the numbers; None: it does already.

    Asynchronous where the device has pinned memory and events; a device without them is waited for.
    """
    device = tensor.device
    if is_host(device):
        return tensor.clone(), None
    if not _pins(device.type) or _event_class(device.type) is None:
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host, mark(device)


def mark(device: torch.device, *, timed: bool = False) -> Any:
    """Return a `Mark` after the work that was queued on a device so far; None where there is no such thing.

    Args:
        device: whose work.
        timed: the mark tells with `elapsed_time(later)` how many milliseconds lie between it and a later one.
    """
    make = None if is_host(device) else _event_class(device.type)
    if make is None or (timed and not hasattr(make, "elapsed_time")):
        return None
    event = make(enable_timing=True) if timed else make()
    stream = getattr(torch.get_device_module(device), "current_stream", None)
    if stream is None:
        event.record()
    else:
        event.record(stream(device))  # without it some record on the device that is current
    return event


@cache
def _event_class(kind: str) -> Callable[..., Any] | None:
    try:
        found = getattr(torch.get_device_module(kind), "Event", None)
    except RuntimeError:  # no module of that name
        return None
    needed = ("record", "query", "synchronize")
    return found if all(hasattr(found, name) for name in needed) else None


@cache
def _pins(kind: str) -> bool:
    # Pinned memory belongs to the accelerator of the process; of any other device's kind there is none.
    found = accelerator()
    if found is None or found.type != kind:
        return False
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, TypeError):
        return False


def accelerator() -> torch.device | None:
    """Return the accelerator of this process; None where there is none, which torch 2.6 says by an exception."""
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:
        return None


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes that torch has allocated on a device, by a counter on the host; 0 where nobody counts."""
    count = None if is_host(device) else getattr(torch.get_device_module(device), "memory_allocated", None)
    return int(count(device)) if count is not None else 0


def give_back_memory() -> None:
    """Give freed memory of the accelerator's devices back to the driver."""
    found = _accelerator_in_use()
    empty = None if found is None else getattr(found[1], "empty_cache", None)
    if empty is not None:
        empty()


def wait_for(device: torch.device) -> None:
    """Wait until all work that was queued on a device is done."""
    if not is_host(device):
        torch.accelerator.synchronize(device)


def random_state() -> dict[str, Any]:
    """Return the random state of the CPU and of all devices of the accelerator, where it is in use."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    used = _accelerator_in_use()
    if used is not None and hasattr(used[1], "get_rng_state"):
        kind, module = used
        state[kind] = [module.get_rng_state(*device) for device in _each(kind, module)]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put a `random_state` back."""
    torch.set_rng_state(state["cpu"])
    used = _accelerator_in_use()
    if used is not None and used[0] in state:
        kind, module = used
        for device, one in zip(_each(kind, module), state[kind], strict=False):
            module.set_rng_state(one, *device)


def _accelerator_in_use() -> tuple[str, Any] | None:
    found = accelerator()
    if found is None:
        return None
    module = torch.get_device_module(found)
    # A device that nobody has used yet must not be started for this.
    is_used = getattr(module, "is_initialized", lambda: True)()
    return (found.type, module) if is_used else None


def _each(kind: str, module: Any) -> list[tuple[torch.device, ...]]:
    """Return how to name each device in a call; not at all where there is one (MPS takes no name)."""
    count = module.device_count()
    return [()] if count == 1 else [(torch.device(kind, index),) for index in range(count)]
