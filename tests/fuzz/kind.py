"""What a kind of file tells the fuzzer of itself."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .damage import damage_bytes


@dataclass
class Reading:
    """What came out of reading.

    Attributes:
        found: what was there, each by something that names it (a record's step, an incident's key).
        refused: the one line with which the whole was refused; "" where it was read. Counts as told.
    """

    found: set[Hashable] = field(default_factory=set)
    refused: str = ""


class Kind(ABC):
    """One kind of file, or folder of files.

    Attributes:
        name: on the command line.
        share: of all corruptions, relative to the others'.
    """

    name: str
    share: float = 1.0

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write a sound sample into an empty folder."""

    @abstractmethod
    def read(self, folder: Path) -> Reading:
        """Read it as every reader would. A `GradwatchError` means refused; any other exception is a fault.

        Warnings of gradwatch's count as told: they are caught outside.
        """

    def files(self, folder: Path) -> Iterable[Path]:
        """Return which of the sample's files may be damaged."""
        return sorted(p for p in folder.rglob("*") if p.is_file())

    def damage(self, folder: Path, rng: np.random.Generator) -> str:
        """Damage the sample; return what was done, in words."""
        files = list(self.files(folder))
        file = files[int(rng.integers(len(files)))]
        return f"{file.relative_to(folder)}: {damage_bytes(file, rng)}"


def all_kinds() -> list[Kind]:
    """Return one of every kind, in order of their names."""
    from . import kinds

    for module in pkgutil.iter_modules(kinds.__path__):
        importlib.import_module(f"{kinds.__name__}.{module.name}")
    return sorted((cls() for cls in _leaves(Kind)), key=lambda kind: kind.name)


def _leaves(cls: type[Kind]) -> list[type[Kind]]:
    children = cls.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [cls]
