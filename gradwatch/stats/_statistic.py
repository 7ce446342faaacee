"""What a measurement of one's own is made of: a class with a name, `sums` or `maxima`, and `finish`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..records import MODULE, PARAMETER, Column, add_column, snake_case
from ..torchside import Attended, home, moved, wide_dtype

__all__ = ["ALONE", "GIVEN", "OF_CALLS", "At", "Number", "Ranks", "Statistic", "View"]

GIVEN = ("gradients", "parameters", "optimizer_state", "updates", "outputs", "attention")
"""What a statistic may need."""
OF_CALLS = frozenset({"outputs", "attention"})
"""What is shown call by call, and stands alone among what a statistic needs."""

Number = Tensor | Sequence[Tensor] | NDArray[Any] | float
"""What travels to the host as it is: a tensor of any shape, several 0-dim ones, or what the host knows already."""


class Ranks(NamedTuple):
    """Who takes part in a step, and what they have in common: the same on all of them.

    Attributes:
        num: how many.
        num_params: parameters that are watched; they come first in the index.
        has_copies: each rank holds a whole copy of all of them.
        has_batches: each has batches of its own.
        is_sampled: modules are sampled at this step.
    """

    num: int = 1
    num_params: int = 0
    has_copies: bool = False
    has_batches: bool = True
    is_sampled: bool = False


ALONE = Ranks()


class At(NamedTuple):
    """A column's numbers at some places of the index; all others were not measured."""

    places: NDArray[np.int64]
    values: NDArray[Any]


_TOLD = {"before": "updates"}


class View:
    """What a statistic is shown: tensors that it must not change, nor read back, nor keep (a copy it may).

    With `needs` of gradients, parameters or optimizer state there is one for each parameter that has a gradient, all
    in the order of `paths`; of a sharded one the piece on this rank. With `"updates"` among its needs it is asked when
    the optimizer has stepped: all is as the step has left it, and `before` as it was. With `needs = {"outputs"}` there
    is one view for each call of a module: `paths` holds the module's, `outputs` its float tensors. With
    `needs = {"attention"}` one for each time that a module attends.

    Attributes:
        step: optimizer steps taken so far.
        paths: what the rows are about.
        outputs: of one module's call; empty else.
        attention: of one module, before its softmax; None else.
        memory: kept from one step to the next, as long as the paths are the same; empty at first.
        ranks: who takes part.
        rank: which of them this is.
    """

    ranks: Ranks = ALONE
    rank: int = 0

    def __init__(
        self,
        step: int,
        paths: Sequence[str],
        memory: dict[str, Any],
        *,
        tensors: Mapping[str, Callable[[], Sequence[Tensor]]] | None = None,
        state: Callable[[str], Sequence[Tensor | None]] | None = None,
        options: Callable[[str], Sequence[Any]] | None = None,
        outputs: Sequence[Tensor] = (),
        attention: Attended | None = None,
    ) -> None:
        self.attention = attention
        self.step, self.paths, self.memory, self.outputs = step, tuple(paths), memory, tuple(outputs)
        self._tensors, self._state, self._options = tensors or {}, state, options
        self._kept: dict[str, Sequence[Tensor]] = {}

    def _given(self, name: str) -> Sequence[Tensor]:
        if name not in self._kept:
            if name not in self._tensors:
                raise ConfigError(f"there are no {name} in this view: name {_TOLD.get(name, 'them')} in `needs`.")
            self._kept[name] = self._tensors[name]()
        return self._kept[name]

    @property
    def grads(self) -> Sequence[Tensor]:
        """The gradients as the optimizer will use them, before any treatment."""
        return self._given("gradients")

    @property
    def params(self) -> Sequence[Tensor]:
        """The parameters, before the optimizer's step; after it where updates are needed."""
        return self._given("parameters")

    @property
    def before(self) -> Sequence[Tensor]:
        """Copies of the parameters before the optimizer's step, where updates are needed."""
        return self._given("before")

    def show(self, **tensors: Sequence[Tensor]) -> None:
        """Show these under their names, whatever else there is."""
        self._kept.update(tensors)

    def state(self, name: str) -> Sequence[Tensor | None]:
        """Return what the optimizer keeps under a name (`"exp_avg"`) for each parameter; None where it has none."""
        if self._state is None:
            raise ConfigError("there is no optimizer_state in this view: name it in `needs`.")
        return self._state(name)

    def options(self, name: str) -> Sequence[Any]:
        """Return what the optimizer is set to (`"betas"`, `"lr"`) for each parameter; None where it has no such option.

        As it stands in the parameter's group: a number, a tuple, or a tensor, which is not to be read back.
        """
        if self._options is None:
            raise ConfigError("there are no options of the optimizer in this view: name optimizer_state in `needs`.")
        return self._options(name)

    def rows(self, *columns: Sequence[Tensor]) -> Tensor:
        """Return lists of 0-dim tensors, one for each path, as columns side by side: shape (n, len(columns)).

        Raises:
            TypeError: one of them is none, or no tensor of one real number.
        """
        for x in (x for column in columns for x in column):
            if not isinstance(x, torch.Tensor) or x.numel() != 1 or x.is_complex():
                given = f"a tensor of {x.dtype}, shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
                raise TypeError(f"`rows` takes a tensor of one real number for each path. Got {given}")
        device = home([x for column in columns for x in column]) if any(columns) else torch.device("cpu")
        wide = wide_dtype(device)
        flat = [moved(x.detach(), device, wide).reshape(()) for column in columns for x in column]
        if not flat:
            return torch.zeros(0, len(columns), dtype=wide, device=device)
        return torch.stack(flat).reshape(len(columns), -1).T


class Statistic:
    """A measurement of one's own. On record as a column (or a number) of its name, like any built-in one.

    A class says what it is called and how it is drawn, in class attributes; what it needs; and how it is measured: on
    the device with `sums` and `maxima`, whose numbers merge over ranks (and calls) by addition and maximum, and on the
    host with `finish`, which makes the result of them. Where one fails it is switched off, with one warning.

    What has other rows than one per parameter or module (one per rank) declares `tables`, is measured with `measure`,
    and finished with `conclude`; `num_sums = 0` where that is all.

    Attributes:
        name: by default the class name in snake case.
        unit, label, scale, signed, guide, combine: see `gradwatch.records.Column`.
        kind: of the result: `"parameter"`, `"module"` or `"scalar"`; by default what the rows are about.
        needs: of `"gradients"`, `"parameters"`, `"optimizer_state"` (and its options) and `"updates"`; or `"outputs"`,
            or `"attention"`, alone.
        every: measured at one optimizer step in this many, and at the powers of two below it; 0: at the first alone.
        num_sums, num_maxima: numbers per row of what `sums` and `maxima` return.
        whole: what it says of a tensor does not add up from its parts: a parameter that lies in pieces on several ranks
            gets nan.
    """

    name: str = ""
    unit: str = ""
    label: str = ""
    meaning: str = ""
    kind: str = ""
    scale: str = "log10"
    combine: str = "max"
    signed: bool = False
    guide: float | None = None
    needs: frozenset[str] = frozenset({"gradients"})
    every: int = 1
    num_sums: int = 1
    num_maxima: int = 0
    whole: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Tell of its columns, so that expressions may name them from here on."""
        super().__init_subclass__(**options)
        cls.name = cls.__dict__.get("name") or snake_case(cls.__name__)
        needs = (cls.needs,) if isinstance(cls.needs, str) else cls.needs
        cls.needs = frozenset(needs)
        if not cls.needs <= set(GIVEN) or not cls.needs or (cls.needs & OF_CALLS and len(cls.needs) > 1):
            raise ConfigError(
                f"`needs` of statistic {cls.name!r} are some of {', '.join(GIVEN[:4])}, or outputs or attention alone. "
                f"Got {', '.join(sorted(map(str, cls.needs))) or 'none'}."
            )
        for setting, low in (("every", 0), ("num_sums", 0), ("num_maxima", 0)):
            value = getattr(cls, setting)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"`{setting}` of statistic {cls.name!r} is a number, {low} or more. Got {value!r}.")
        cls.kind = cls.kind or cls.over()
        cls.meaning = cls.__dict__.get("meaning") or (cls.__doc__ or cls.name).strip().partition("\n")[0]
        for column in cls.columns():
            add_column(column)

    @classmethod
    def over(cls) -> str:
        """Return what the rows are about: `"parameter"` or `"module"`."""
        return MODULE if cls.needs & OF_CALLS else PARAMETER

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """Return what it puts on record: one column of its name, unless this is overridden."""
        drawn = {name: getattr(cls, name) for name in ("unit", "label", "scale", "combine", "signed", "guide")}
        when = {0: "the first step", 1: "every step"}.get(cls.every, f"one step in {cls.every}")
        return (Column(name=cls.name, kind=cls.kind, meaning=cls.meaning, when=when, **drawn),)

    def sums(self, view: View) -> Tensor | None:
        """Return numbers that add up over ranks, pieces, calls and micro-batches.

        Returns:
            On the device, unread: shape (len(view.paths), num_sums), nan and inf as they are; None where there is
            nothing to say at this step (the first one), the same on all ranks.
        """
        return None

    def maxima(self, view: View) -> Tensor | None:
        """Return numbers of which the largest counts, of shape (len(view.paths), num_maxima); asked after `sums`."""
        return None

    def finish(self, sums: NDArray[np.float64], maxima: NDArray[np.float64]) -> Any:
        """Return what goes on record, from the merged numbers, on the host.

        Args:
            sums: float64, shape (n, num_sums).
            maxima: float64, shape (n, num_maxima).

        Returns:
            Shape (n,) for a column, a number for a scalar; a mapping of names to those where there are several. Nan is
            a value: it goes on record as it is. A name that ends in "/" is a family of scalars, of which a path has
            several, shape (n, k): `family/path/0`, ...; there nan stands for none.
        """
        return sums[:, 0] if self.num_sums else maxima[:, 0]

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of sums of its own layout, by name: `(ranks.num, 2)` has a row for each rank. By default
        none. They travel in the step's one exchange: on all ranks the same."""
        return {}

    def measure(self, view: View, tables: dict[str, Tensor]) -> Mapping[str, Number] | None:
        """Fill in this rank's part of the tables, which are zeros and are added up over ranks. Reads nothing back.

        Of a rank that could not measure they stay zeros.

        Returns:
            Numbers of this rank alone, by name, which go to the host and to no other rank; None for none.
        """
        return None

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        """Return what goes on record, by name, on the host: a number, or a column at some places.

        Args:
            found: the tables, added up over ranks, and the numbers that `measure` gave: float64 arrays.
        """
        return {}

    @classmethod
    def has_tables(cls) -> bool:
        """Return whether `measure` is to be asked."""
        return cls.measure is not Statistic.measure
