"""Interventions that learn: hook functions that are modules, saved and loaded by the ids of their hooks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from ..errors import ConfigError
from ._hook import Hook
from ._store import safetensors_torch

__all__ = ["load_interventions", "save_interventions", "trainable"]


def trainable(hooks: Iterable[Hook]) -> dict[str, nn.Module]:
    """Return the functions that are modules, or hold one as their `fn`, by the id of their hook."""
    found: dict[str, nn.Module] = {}
    for hook in hooks:
        for fn in (hook.fn, getattr(hook.fn, "fn", None)):
            if isinstance(fn, nn.Module):
                found[hook.id] = fn
                break
    return found


def save_interventions(hooks: Iterable[Hook], path: str | Path) -> None:
    """Write parameters and buffers of every function that is a module to one safetensors file."""
    modules = trainable(hooks)
    if not modules:
        raise ConfigError("no hook function is a module: there is nothing to save. Write it as an nn.Module.")
    tensors: dict[str, Tensor] = {}
    for hook_id, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{hook_id}/{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    safetensors_torch().torch.save_file(tensors, path)


def load_interventions(hooks: Iterable[Hook], path: str | Path) -> list[str]:
    """Load what `save_interventions` wrote into the hooks of the same ids; return these.

    Raises:
        ConfigError: the file and the hooks do not fit.
    """
    modules = trainable(hooks)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors_torch().torch.load_file(path).items():
        hook_id, _, name = key.partition("/")
        states.setdefault(hook_id, {})[name] = tensor
    if unknown := sorted(set(states) - set(modules)):
        raise ConfigError(
            f"{path} holds interventions {', '.join(map(repr, unknown))}, and no hook of that id has a module for its "
            "function: add them first, with the ids they had."
        )
    for hook_id, state in states.items():
        modules[hook_id].load_state_dict(state)
    return list(states)
