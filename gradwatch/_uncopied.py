"""Objects that work on one live model, and of which there is no copy."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["Uncopied"]

_Self = TypeVar("_Self", bound="Uncopied")


class Uncopied:
    """What holds hooks, threads and files: a model, a trainer or a data set that keeps one among its attributes is
    copied, pickled and saved all the same, and its copy has None in that place."""

    def __copy__(self: _Self) -> _Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
