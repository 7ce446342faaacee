"""What trainers and users call validation metrics, under the one name that rules know: `val_loss`, `val_<metric>`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ._guard import Guard

__all__ = ["as_number", "validation_name", "validation_scalars"]

_MARKS = ("val", "valid", "validation", "validate", "dev", "eval", "evaluation", "test")
_TRAINING = frozenset({"train", "training"})
_LOADER = re.compile(r"/dataloader_idx_(\d+)$")
_SEPARATORS = re.compile(r"[\W_]+")
_CAMEL = re.compile(rf"^(?i:{'|'.join(sorted(_MARKS, key=len, reverse=True))})(?=[A-Z])")
_OWN = "train_eval_loss"
"""The loss of the training data in eval mode: a name that rules know as it is."""


def validation_name(key: str, *, known: bool = False) -> str | None:
    """Return the name of a validation metric on record; None for what is none.

    Told by a word of its own, wherever it stands: `val_loss`, `Val/Loss`, `loss/val`, `dev_loss`, `valLoss`; not by
    letters (`value_loss`), and not beside `train`. The metric of the first of several data loaders has the plain name.

    Args:
        key: as it was logged.
        known: it is one, whatever its name.
    """
    if key == _OWN:
        return key
    loader = _LOADER.search(key)
    words = [w for w in _SEPARATORS.split(_LOADER.sub("", key)) if w]
    rest = [w for w in (_unmarked(w) for w in words) if w]
    is_marked = rest != words
    if not known and (not is_marked or any(w.lower() in _TRAINING for w in rest)):
        return None
    name = "_".join(rest) or "value"
    name = "loss" if name.lower() == "loss" else name
    further = "" if loader is None or loader.group(1) == "0" else f"_dataloader_idx_{loader.group(1)}"
    return f"val_{name}{further}"


def _unmarked(word: str) -> str:
    camel = _CAMEL.sub("", word) if not word.isupper() else word
    return "" if word.lower() in _MARKS else camel


def validation_scalars(
    metrics: Mapping[str, Any], guard: Guard, *, known: Collection[str] | None = None
) -> dict[str, float]:
    """Return the validation metrics among these that are numbers, under their names on record.

    Args:
        metrics: as they were logged; a dict among them counts entry by entry, None not at all.
        guard: told of what is no number, and why.
        known: the names of those that are validation metrics; None: told by their names.
    """
    found: dict[str, float] = {}
    with guard("validation metrics"):
        for key, value in metrics.items():
            is_known = known is not None and _is_known(str(key), known)
            name = validation_name(str(key), known=is_known)
            if name is None or (known is not None and not is_known):
                continue
            entries = {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for entry, number in entries.items():
                _put(found, entry, number, guard)
    return found


def _put(found: dict[str, float], name: str, value: Any, guard: Guard) -> None:
    try:
        if value is not None:
            found[name] = as_number(value)
    except Exception as error:
        guard.miss(f"the validation metric {name!r}", error)


def _is_known(key: str, known: Collection[str]) -> bool:
    base = _LOADER.sub("", key)
    return base in known or re.sub(r"_(?:step|epoch)$", "", base) in known


def as_number(value: Any) -> float:
    """Return a metric given as a number, a tensor or an array of one element.

    Raises:
        TypeError: it is none of these, or complex: half of a number is none.
    """
    if isinstance(value, np.complexfloating) or (isinstance(value, np.ndarray) and np.iscomplexobj(value)):
        raise TypeError("a metric must be real. Got a complex number.")
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size != 1:
            raise TypeError(f"a metric must be one number. Got {size}.")
        if isinstance(value, Tensor) and value.is_complex():
            raise TypeError("a metric must be real. Got a complex number.")
        return float(value.detach()) if isinstance(value, Tensor) else float(value.reshape(()))
    if not hasattr(type(value), "__float__"):
        has_result = hasattr(type(value), "compute")
        raise TypeError(f"{type(value).__name__} is no number{': give what its `compute()` returns' * has_result}.")
    return float(value)
