"""The names that a model has: modules, parameters, shared ones' other names, and its stack of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import ConfigError, UnknownPathError
from ..torchside import clean_path, takes_hooks

__all__ = ["ModelNames"]


class ModelNames:
    """Modules and parameters by name, as they are now; a shared one has a first name and other names.

    Attributes:
        modules: by first name; the root is `""`.
        parameters: by first name.
        other_names: first name -> the other ones.
        refusing: paths of modules that torch takes no hooks on.
    """

    def __init__(self, model: nn.Module, *, layers: str | None = None) -> None:
        self.model_name = type(model).__name__
        self.other_names: dict[str, tuple[str, ...]] = {}
        self.modules: dict[str, nn.Module] = self._unique(model.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = self._unique(model.named_parameters(remove_duplicate=False))
        self.refusing = {path for path, module in self.modules.items() if not takes_hooks(module)}
        self._layers = layers
        self._first_names: dict[bool, dict[str, str]] = {}

    def _unique(self, pairs: Iterable[tuple[str, object]]) -> dict:  # type: ignore[type-arg]
        first: dict[int, str] = {}
        found: dict[str, object] = {}
        others: dict[str, list[str]] = {}
        for name, value in pairs:
            canonical = first.setdefault(id(value), name)
            if canonical == name:
                found[name] = value
            else:
                others.setdefault(canonical, []).append(name)
        taken = set(found).union(*others.values())
        for name in found:
            cleaned = clean_path(name, parallel=True)
            if cleaned not in taken:
                others.setdefault(name, []).append(cleaned)
        self.other_names.update({name: tuple(dict.fromkeys(more)) for name, more in others.items()})
        return found

    def spellings(self, *, parameters: bool = False) -> Iterator[tuple[str, str]]:
        """Yield (any name, first name) of every module, or of every parameter."""
        for name in self.parameters if parameters else self.modules:
            yield name, name
            for other in self.other_names.get(name, ()):
                yield other, name

    def first_name(self, name: str, *, parameters: bool = False) -> str | None:
        """Return the first name of what any of its names means exactly; None where there is no such name."""
        if parameters not in self._first_names:
            self._first_names[parameters] = dict(reversed(list(self.spellings(parameters=parameters))))
        return self._first_names[parameters].get(name)

    def path_of(self, target: object) -> str:
        """Return the first name of a module or parameter object.

        Raises:
            UnknownPathError: it is not part of the model.
        """
        pairs = [*self.modules.items(), *self.parameters.items()]
        for name, value in pairs:
            if value is target:
                return name
        shown = f"{type(target).__name__} object"
        raise UnknownPathError(
            shown, [name for name, _ in pairs], model_name=self.model_name, kind="module or parameter"
        )

    def layer_paths(self) -> list[str]:
        """Return the paths of "layer 0", "layer 1", ...: the children of the model's stack of like blocks.

        The stack is the container given as `layers`, else the one list or Sequential of at least two modules of one
        class that holds the most parameters; else a Sequential model's own children.

        Raises:
            ConfigError: there is none, or several are alike.
        """
        if self._layers is not None:
            if self._layers not in self.modules:
                raise UnknownPathError(self._layers, self.modules, model_name=self.model_name, kind="module")
            return self._children(self._layers)
        stacks = {path: size for path, module in self.modules.items() if (size := _stack_size(module))}
        # A stack within a block of another stack is not the model's.
        stacks = {p: s for p, s in stacks.items() if not any(q != p and _is_inside(p, q) for q in stacks)}
        if not stacks and isinstance(self.modules[""], (nn.Sequential, nn.ModuleList)):
            return self._children("")
        if len(stacks) != 1:
            found = f"{len(stacks)}: {', '.join(map(repr, stacks))}" if stacks else "none"
            raise ConfigError(
                f"layers by number need one stack of like blocks in {self.model_name}. Found {found}. "
                f"Name one: HookManager(model, layers={next(iter(stacks), 'path.of.the.list')!r})."
            )
        return self._children(next(iter(stacks)))

    def _children(self, path: str) -> list[str]:
        return [f"{path}.{name}" if path else name for name, _ in self.modules[path].named_children()]


def _is_inside(path: str, container: str) -> bool:
    return container == "" or path.startswith(container + ".")


def _stack_size(module: nn.Module) -> int:
    children = list(module.children())
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(children) < 2:
        return 0
    if len({type(child) for child in children}) > 1:
        return 0
    return sum(1 for child in children for _ in child.parameters())
