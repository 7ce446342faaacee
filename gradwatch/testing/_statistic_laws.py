"""Laws that every statistic keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocols import Statistic
from ..records import FAMILIES, SCALAR, Column, column_of
from ..stats import GIVEN, OF_CALLS, View
from ..stats import Statistic as WithTables
from ..torchside import Attended
from ._table_laws import check_tables

__all__ = ["check_statistic"]

_SHAPES = ((4, 6), (6,), (2, 3, 2))
_PATHS = ("0.weight", "0.bias", "1.weight")
_STEPS = 3

Tensors = dict[str, list[Tensor]]
Numbers = tuple[NDArray[np.float64], NDArray[np.float64]]


def check_statistic(statistic: Statistic) -> None:
    """Raise where a statistic breaks a law that gradwatch relies on.

    * it has a name, what it needs, a cadence and widths that can be, and its columns are told of;
    * `sums` and `maxima` read nothing back to the host, which would wait for the device at every step;
    * they give one row per path, as wide as it says, and leave what they are shown as it is;
    * they merge: those of the parts of a tensor, as several ranks hold them, add up to those of the whole (for outputs:
      of the parts of a batch); an empty part adds nothing and raises nothing. Not asked of those of whole tensors
      alone (`whole = True`);
    * what is not finite is not hidden: nan counts as something else than zero;
    * `finish` gives what its columns say, the same again for the same numbers, whatever these are;
    * so does `conclude`, and of a table with a row for each rank a rank fills in its own row alone.

    Args:
        statistic: set up as it will be used. It is shown tensors of some three parameters, or of one module's output.

    Raises:
        AssertionError: which law, and what was seen.
    """
    kind = type(statistic).__name__
    _law(isinstance(statistic, Statistic), f"{kind} has name, needs, every, widths, columns, sums, maxima and finish")
    _is_told_of(statistic)
    if isinstance(statistic, WithTables) and statistic.has_tables():
        check_tables(statistic, _view, _made)
        if not statistic.num_sums + statistic.num_maxima:
            return
    _reads_nothing_back(statistic)
    whole = _run(statistic, _made())
    says = any(numbers is not None for numbers in whole)
    _law(says, f"{statistic.name} says something within {_STEPS} steps")
    if not statistic.whole:
        _merges(statistic, whole)
    _hides_nothing(statistic)
    _finishes(statistic, whole)


def _is_told_of(statistic: Statistic) -> None:
    name, needs = statistic.name, set(statistic.needs)
    _law(bool(needs) and needs <= set(GIVEN), f"{name} needs some of {', '.join(GIVEN)}. It needs {sorted(needs)}")
    says = f"It says {statistic.every}"
    _law(statistic.every >= 0, f"{name} is measured at one step in `every`, or with 0 at the first alone. {says}")
    has_tables = isinstance(statistic, WithTables) and statistic.has_tables()
    _law(statistic.num_sums + statistic.num_maxima > 0 or has_tables, f"{name} has sums, maxima or `measure`")
    columns = list(statistic.columns())
    _law(bool(columns) and all(isinstance(c, Column) for c in columns), f"{name} has columns")
    for column in columns:
        _law(column_of(column.name) is not None, f"{name}: `add_column` was told of {column.name!r}")


def _made(seed: int = 0, device: str = "cpu") -> list[Tensors]:
    """Return what a few steps show: gradients, parameters and two sorts of state, by name."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(_STEPS):
        shown = {
            k: [torch.randn(s, generator=generator) for s in _SHAPES]
            for k in ("gradients", "parameters", "state", "before")
        }
        steps.append({name: [t.to(device) for t in tensors] for name, tensors in shown.items()})
    return steps


def _view(statistic: Statistic, step: int, shown: Tensors, memory: dict[str, Any]) -> View:
    if "outputs" in statistic.needs:
        return View(step, _PATHS[:1], memory, outputs=shown["gradients"][:1])
    if "attention" in statistic.needs:
        return View(step, _PATHS[:1], memory, attention=_attended(shown["gradients"][0]))
    needs = {*statistic.needs, *(("before", "parameters") if "updates" in statistic.needs else ())}
    tensors = {name: partial(shown.__getitem__, name) for name in needs if name in shown}
    if "optimizer_state" not in statistic.needs:
        return View(step, _PATHS, memory, tensors=tensors)
    return View(step, _PATHS, memory, tensors=tensors, state=partial(_state, shown, step), options=_options)


def _attended(queries: Tensor) -> Attended:
    """Return what four samples or fewer attend to, one a row: two heads of three numbers, over five keys of their
    own."""
    keys = torch.linspace(-1.0, 1.0, 5, device=queries.device)[:, None].expand(1, 2, 5, 3)
    return Attended(queries.reshape(-1, 2, 1, 3), keys.expand(len(queries), 2, 5, 3))


def _state(shown: Tensors, step: int, name: str) -> list[Tensor]:
    """Return what an optimizer keeps: as large as the parameter, but for the number of its steps."""
    kept = shown["state"]
    return [tensor.new_full((), step + 1.0) for tensor in kept] if name == "step" else kept


def _options(name: str) -> list[Any]:
    """Return options as of an optimizer like Adam."""
    return [{"betas": (0.9, 0.99), "eps": 1e-8}.get(name, 0.1)] * len(_PATHS)


def _ask(statistic: Statistic, view: View) -> tuple[Tensor | None, Tensor | None]:
    """Return sums and maxima in float64; None where there is nothing to say."""
    found = []
    for what, width in (("sums", statistic.num_sums), ("maxima", statistic.num_maxima)):
        value = getattr(statistic, what)(view) if width else None
        if value is not None:
            n = len(view.paths)
            _law(
                isinstance(value, Tensor), f"{statistic.name}: `{what}` gives a tensor. It gave {type(value).__name__}"
            )
            value = value[:, None] if value.shape == (n,) and width == 1 else value
            seen = tuple(value.shape)
            _law(seen == (n, width), f"{statistic.name}: `{what}` gives {n} rows of {width}. It gave shape {seen}")
        found.append(value)
    return found[0], found[1]


def _reads_nothing_back(statistic: Statistic) -> None:
    memory: dict[str, Any] = {}
    try:
        for step, shown in enumerate(_made(device="meta")):
            _ask(statistic, _view(statistic, step, shown, memory))
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"broken law: {statistic.name} reads nothing back to the host. On tensors without data: {error}"
        ) from error


def _run(statistic: Statistic, steps: Sequence[Tensors]) -> list[Numbers | None]:
    """Return the numbers of each step, None where there is nothing to say."""
    memory: dict[str, Any] = {}
    found: list[Numbers | None] = []
    for step, shown in enumerate(steps):
        before = {name: [t.clone() for t in tensors] for name, tensors in shown.items()}
        sums, maxima = _ask(statistic, _view(statistic, step, shown, memory))
        same = all(
            torch.equal(a, b) for n in shown for a, b in zip(shown[n], before[n], strict=True) if not a.isnan().any()
        )
        _law(same, f"{statistic.name} leaves what it is shown as it is")
        rows = 1 if statistic.needs & OF_CALLS else len(_PATHS)
        said = sums is not None or maxima is not None
        found.append(
            (_host(sums, rows, statistic.num_sums, 0.0), _host(maxima, rows, statistic.num_maxima, -np.inf))
            if said
            else None
        )
    return found


def _host(value: Tensor | None, rows: int, width: int, otherwise: float) -> NDArray[np.float64]:
    if value is None:
        return np.full((rows, width), otherwise)
    _law(not value.is_complex(), f"sums and maxima are real. Got {value.dtype}")
    return value.detach().to(torch.float64).numpy().copy()


def _merges(statistic: Statistic, whole: Sequence[Numbers | None]) -> None:
    for what, cuts in (("two parts", (0.5,)), ("three parts, one of them empty,", (0.5, 1.0))):
        parts = _run_parts(statistic, cuts)
        for step, expected in enumerate(whole):
            told = [part[step] for part in parts]
            alike = all((part is None) == (expected is None) for part in told)
            _law(alike, f"{statistic.name} says something of {what} at step {step} where it does of the whole")
            known = [part for part in told if part is not None]
            if expected is None:
                continue
            sums, maxima = sum(p[0] for p in known), np.max([p[1] for p in known], axis=0, initial=-np.inf)
            seen = f"At step {step} they give {np.asarray(sums).tolist()}, the whole gives {expected[0].tolist()}"
            close = np.allclose(sums, expected[0], rtol=1e-4, atol=1e-5, equal_nan=True)
            _law(close, f"{statistic.name}: sums of {what} of each tensor add up to those of the whole. {seen}")
            close = np.allclose(maxima, expected[1], rtol=1e-4, atol=1e-5, equal_nan=True)
            _law(close, f"{statistic.name}: the largest of the maxima of {what} is that of the whole. At step {step}")


def _run_parts(statistic: Statistic, cuts: Sequence[float]) -> list[list[Numbers | None]]:
    try:
        return [_run(statistic, steps) for steps in _cut(_made(), cuts)]
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(
            f"broken law: {statistic.name} raises nothing over the part of a tensor that one rank holds, which may be "
            f"empty. It raised {type(error).__name__}: {error}"
        ) from error


def _cut(steps: Sequence[Tensors], cuts: Sequence[float]) -> list[list[Tensors]]:
    """Return steps as each of several ranks sees them: with its piece of every tensor."""
    marks = (0.0, *cuts, 1.0)
    pieces = []
    for low, high in pairwise(marks):
        pieces.append(
            [{n: [t[int(low * len(t)) : int(high * len(t))] for t in ts] for n, ts in s.items()} for s in steps]
        )
    return pieces


def _hides_nothing(statistic: Statistic) -> None:
    for bad in (float("nan"), float("inf")):
        seen, plain = (_run(statistic, _spoilt(value)) for value in (bad, 0.0))
        same = all(a is None or b is None or _equal(a, b) for a, b in zip(seen, plain, strict=True))
        _law(
            not same, f"{statistic.name} hides nothing: {bad} among what it measures gives another result than 0 there"
        )


def _spoilt(value: float) -> list[Tensors]:
    steps = _made()
    for shown in steps:
        for tensors in shown.values():
            for tensor in tensors:
                tensor.view(-1)[1] = value
    return steps


def _equal(a: Numbers, b: Numbers) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def _finishes(statistic: Statistic, whole: Sequence[Numbers | None]) -> None:
    told = [numbers for numbers in whole if numbers is not None]
    for value in (None, 0.0, float("nan"), float("inf")):
        for sums, maxima in told:
            given = [x.copy() if value is None else np.full_like(x, value) for x in (sums, maxima)]
            with np.errstate(all="ignore"):
                first, again = (_finished(statistic, *(x.copy() for x in given)) for _ in range(2))
            _law(_equal_all(first, again), f"{statistic.name}: `finish` gives the same again for the same numbers")


def _finished(statistic: Statistic, sums: Any, maxima: Any) -> dict[str, NDArray[np.float64]]:
    known = {column.name: column for column in statistic.columns()}
    found = statistic.finish(sums, maxima)
    found = found if isinstance(found, Mapping) else {statistic.name: found}
    found = {name: value for name, value in found.items() if name not in FAMILIES}
    unknown = sorted(set(found) - set(known))
    _law(not unknown, f"{statistic.name}: `finish` gives what its columns name. It gave {unknown}")
    values = {name: np.asarray(value, np.float64) for name, value in found.items()}
    for name, value in values.items():
        shape = () if known[name].kind == SCALAR else (len(sums),)
        _law(value.shape == shape, f"{statistic.name}: {name!r} has shape {shape}. `finish` gave {value.shape}")
    return values


def _equal_all(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


def _law(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(f"broken law: {text}.")
