"""A run's memory as a checkpoint keeps it: with the version of its form, the model it is of, and a digest of itself.

A checkpoint comes back from anywhere: cut short, of another release, of another model. What can't be gone on from is
told before anything of it is used: a memory half taken up would judge the new run by numbers of none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from zlib import crc32

from torch import Tensor

from ..errors import GradwatchError
from ..records import Index
from ._ranks import world_size

__all__ = ["VERSION", "UnusableState", "check", "packed", "seal", "unpacked"]

VERSION = 2
"""Of the form of the memory. Raised where an older gradwatch would misread a newer memory, or the other way round."""

_UNSEALED = ("digest", "num_raw_steps")
"""Entries that the digest is not made of: itself, and what a trainer's adapter lays beside the memory."""


class UnusableState(GradwatchError):  # noqa: N818 - why, in words that go on from "the state ..."
    """A state that can't be gone on from: says why."""


def seal(memory: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Return the memory with what `check` looks at."""
    sealed = {**memory, "version": VERSION, "model": _fingerprint(index)}
    return {**sealed, "digest": _digest(sealed)}


def check(state: Any, index: Index) -> Mapping[str, Any]:
    """Return a state that can be gone on from.

    Raises:
        UnusableState: it can't.
    """
    if not isinstance(state, Mapping):
        raise UnusableState(f"is none of gradwatch's (a {type(state).__name__})")
    if "judge" not in state or "version" not in state:
        raise UnusableState("is none of gradwatch's, or parts of it are missing")
    version = state["version"]
    if isinstance(version, bool) or not isinstance(version, int):
        raise UnusableState("is damaged: it has no version")
    if version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise UnusableState(f"is of {age} gradwatch (form {version}; this one reads form {VERSION})")
    if state.get("digest") != _digest(state):
        raise UnusableState("is damaged: it is not what was saved")
    shared = _shared(state["model"], _fingerprint(index))
    if shared < 0.5:
        raise UnusableState(f"is of another model ({shared:.0%} of its parameters are this one's)")
    return state


def packed(memory: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the state of a `Watch`: a memory and the number of steps taken, bound to each other."""
    return {"step": step, "memory": (memory,), "bound": _binding(memory, step)}


def _binding(memory: Any, step: Any) -> int:
    digest = memory.get("digest") if isinstance(memory, Mapping) else None
    return crc32(f"{step} {digest}".encode("utf-8", "surrogatepass"))


def unpacked(state: Any) -> tuple[Any, int]:
    """Return the memory in the state of a `Watch`, and the number of steps it says were taken; 0 where it says none."""
    memory: Any = state
    step: Any = 0
    if isinstance(state, Mapping):
        step = state.get("step", 0)
        if "memory" in state:
            held = state["memory"]
            memory = held[0] if isinstance(held, (tuple, list)) and len(held) == 1 else held
        bound = state.get("bound", _binding(memory, step))
        if not isinstance(bound, int) or bound != _binding(memory, step):
            step = None
    if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53:
        return memory, step
    # What stands beside the memory is damaged: nor is that to be believed.
    return {**memory, "digest": ""} if isinstance(memory, Mapping) else memory, 0


def _fingerprint(index: Index) -> dict[str, list[int]]:
    """Return a number for each parameter by name, and by name and shape where shapes are the whole tensors'."""
    paths = [(p, s) for p, s, kind in zip(index.paths, index.shapes, index.is_parameter, strict=True) if kind]
    names = [crc32(path.encode("utf-8", "surrogatepass")) for path, _ in paths]
    # A shard's shape depends on how many ranks there are; a lazy parameter has none yet.
    is_whole = world_size() == 1 and all(index.numel[index.is_parameter] > 0)
    told = [crc32(f"{path}{tuple(shape)}".encode("utf-8", "surrogatepass")) for path, shape in paths]
    return {"names": names, "shapes": told if is_whole else []}


def _shared(saved: Mapping[str, list[int]], mine: Mapping[str, list[int]]) -> float:
    both = [(set(saved[key]), set(mine[key])) for key in ("names", "shapes")]
    shares = [len(a & b) / min(len(a), len(b)) for a, b in both if a and b]
    return min(shares, default=1.0)


def _digest(state: Mapping[str, Any]) -> str:
    """Return a digest of plain values and tensors, the same whatever has carried them: JSON makes lists of tuples."""
    digest = hashlib.sha256()
    _feed(digest, {k: v for k, v in state.items() if k not in _UNSEALED})
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(b"{")
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
        digest.update(b"}")
    elif isinstance(value, (list, tuple)):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
        digest.update(b"]")
    elif isinstance(value, Tensor):
        digest.update(f"T{tuple(value.shape)}{value.dtype}".encode())
        _feed(digest, value.detach().cpu().tolist())
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass"))
