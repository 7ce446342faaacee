"""MODULE:NAME on the command line -> a model, a batch, and what else a pre-flight takes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ._find import existing, pairs

__all__ = ["load", "pieces_of"]


def load(target: str, arguments: list[str]) -> Any:
    """Return what a target names; a class or a function is called, with the NAME=VALUE arguments (values as in YAML).

    Raises:
        ConfigError: there is no such module or name, or calling it failed: says where.
    """
    place, is_pair, name = target.rpartition(":")
    if not is_pair or not place or not name:
        raise ConfigError(f"give MODULE:NAME, such as package.module:Net or file.py:Net. Got {target!r}.")
    module = _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(found) if not n.startswith("_")]
            raise UnknownNameError("name", part, known, where=place)
        found = getattr(found, part)
    if _is_model(found) and not isinstance(found, type):
        return found
    if isinstance(found, type) or callable(found):
        return _tried(lambda: found(**_values(arguments)), target)
    return found


def pieces_of(made: Any, batch: Any, target: str) -> tuple[Any, Any, tuple[Any, ...], bool]:
    """Return the model, the batch, the loss and optimizer where given, and whether the model is a LightningModule.

    Raises:
        ConfigError: there is no model or no batch among them.
    """
    model, *rest = made if isinstance(made, (tuple, list)) else (made,)
    if not _is_model(model):
        raise ConfigError(
            f"{target} gives {_name(model)}, which is no model. It should be a LightningModule, or a function that "
            "returns (model, batch, loss_fn, optimizer)."
        )
    is_lightning = hasattr(model, "training_step") and len(rest) < 2
    if len(rest) > 3:
        raise ConfigError(f"{target} gives {len(rest) + 1} things; (model, batch, loss_fn, optimizer) are four.")
    if batch is None and rest:
        batch, rest = rest[0], rest[1:]
    elif rest:
        rest = rest[1:]
    if batch is None and is_lightning:
        batch = _own_loader(model, target)
    if batch is None:
        raise ConfigError(f"{target} gives no batch: give one with --batch MODULE:NAME.")
    return model, _first_batch(batch, target), tuple(rest), is_lightning


def _module(place: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if place.endswith(".py"):
        path = existing(place, "file")
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
        loader = spec.loader
        _tried(lambda: loader.exec_module(module), place)
        return module
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError(f"there is no module {place!r} here, nor installed. For a file, give its path: x.py:Net.")
    return _tried(lambda: importlib.import_module(place), place)


def _tried(call: Callable[[], Any], what: str) -> Any:
    """Return what the user's code returns; its error becomes one line that says where."""
    try:
        return call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({last.filename}, line {last.lineno})"
        raise ConfigError(f"{what} failed with {type(error).__name__}: {error}{where}") from error


def _values(arguments: list[str]) -> dict[str, Any]:
    import yaml

    return {name: yaml.safe_load(text) for name, text in pairs(arguments, "--init").items()}


def _is_model(found: Any) -> bool:
    from torch import nn

    return isinstance(found, nn.Module)


def _own_loader(model: Any, target: str) -> Any:
    defined = getattr(type(model), "train_dataloader", None)
    # Lightning's base class has one too, which raises.
    if defined is None or defined.__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
        return None
    return _tried(model.train_dataloader, f"{target}.train_dataloader")


def _first_batch(found: Any, target: str) -> Any:
    """Return the first batch of a data module, a loader or a data set, or of the first of several; a batch as it is."""
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset

    if hasattr(found, "train_dataloader"):
        for step in (lambda: found.prepare_data(), lambda: found.setup("fit")):
            _tried(step, target)
        found = _tried(found.train_dataloader, target)
    if isinstance(found, (tuple, list)) and found and isinstance(found[0], (Dataset, DataLoader)):
        found = found[0]
    if isinstance(found, Dataset):
        found = DataLoader(found, batch_size=32)
    if isinstance(found, (Tensor, Mapping, tuple, list, str)) or not hasattr(found, "__iter__"):
        return found
    return _tried(lambda: next(iter(found)), target)


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"
