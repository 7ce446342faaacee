"""Laws of statistics with tables of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..records import FAMILIES, SCALAR
from ..stats import At, Ranks, Statistic, View

__all__ = ["check_tables"]

_RANKS = Ranks(num=7, num_params=3, has_copies=True)
Found = dict[str, Any]


def check_tables(statistic: Statistic, view: Callable[..., View], made: Callable[..., Any]) -> None:
    """Raise where `tables`, `measure` or `conclude` breaks a law.

    Args:
        statistic: that has them.
        view: makes what it is shown of a step: of statistic, step, tensors and memory.
        made: returns what a few steps show, of a seed and a device.

    Raises:
        AssertionError: which law, and what was seen.
    """
    shapes = dict(statistic.tables(_RANKS))
    sound = all(isinstance(n, int) and n > 0 for shape in shapes.values() for n in shape)
    _law(sound, f"{statistic.name}: `tables` gives shapes. It gave {shapes}")
    _law(shapes == dict(statistic.tables(_RANKS)), f"{statistic.name}: `tables` gives the same again")
    try:
        _run(statistic, view, made(device="meta"), shapes, device="meta")
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"broken law: {statistic.name} reads nothing back to the host. On tensors without data: {error}"
        ) from error
    for rank in (0, _RANKS.num - 1):
        for found in _run(statistic, view, made(), shapes, rank=rank):
            _fills_its_own_row(statistic, found, shapes, rank)
            _concludes(statistic, found)
    try:
        _concludes(statistic, {name: np.zeros(shape) for name, shape in shapes.items()})
    except (LookupError, ValueError, ArithmeticError) as error:
        raise AssertionError(
            f"broken law: {statistic.name}: `conclude` does with tables of zeros and without the numbers of `measure`, "
            f"where no rank could measure. It raised {type(error).__name__}: {error}"
        ) from error


def _run(
    statistic: Statistic,
    view: Callable[..., View],
    steps: Any,
    shapes: Mapping[str, Any],
    rank: int = 0,
    device: str = "cpu",
) -> list[Found]:
    memory: dict[str, Any] = {}
    results = []
    for step, shown in enumerate(steps):
        before = {name: [t.clone() for t in tensors] for name, tensors in shown.items()}
        seen = view(statistic, step, shown, memory)
        seen.ranks, seen.rank = _RANKS, rank
        tables = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        numbers = dict(statistic.measure(seen, tables) or {})
        for name, shape in shapes.items():
            told = tuple(tables[name].shape)
            _law(told == tuple(shape), f"{statistic.name}: table {name!r} is of shape {tuple(shape)}. It is {told}")
        if device != "meta":
            same = all(torch.equal(a, b) for n in shown for a, b in zip(shown[n], before[n], strict=True))
            _law(same, f"{statistic.name} leaves what it is shown as it is")
            results.append({name: _host(value) for name, value in {**numbers, **tables}.items()})
    return results


def _host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).numpy().copy()
    return np.stack([_host(v) for v in value]) if isinstance(value, (list, tuple)) else value


def _fills_its_own_row(statistic: Statistic, found: Found, shapes: Mapping[str, Any], rank: int) -> None:
    for name, shape in shapes.items():
        others = np.delete(found[name], rank, 0) if shape[0] == _RANKS.num else np.zeros(0)
        _law(
            not others.any(),
            f"{statistic.name}: of table {name!r}, with a row for each rank, a rank fills in its own row alone",
        )


def _concludes(statistic: Statistic, found: Found) -> None:
    copies = [{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in found.items()} for _ in range(2)]
    with np.errstate(all="ignore"):
        first, again = (dict(statistic.conclude(copy)) for copy in copies)
    known = {column.name: column for column in statistic.columns()}
    named = {name: value for name, value in first.items() if not name.startswith(tuple(FAMILIES))}
    unknown = sorted(named.keys() - known.keys())
    _law(not unknown, f"{statistic.name}: `conclude` gives what its columns name. It gave {unknown}")
    for name, value in named.items():
        is_scalar = known[name].kind == SCALAR
        what = "a number" if is_scalar else "`At` places"
        fits = np.ndim(value) == 0 if is_scalar else isinstance(value, At) and len(value.places) == len(value.values)
        _law(bool(fits), f"{statistic.name}: {name!r} is {what}. `conclude` gave {value!r}")
    same = first.keys() == again.keys() and all(_equal(first[k], again[k]) for k in first)
    _law(same, f"{statistic.name}: `conclude` gives the same again for the same numbers")


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, At) else [(a, b)]
    return all(np.array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64), equal_nan=True) for x, y in pairs)


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(f"broken law: {text}.")
