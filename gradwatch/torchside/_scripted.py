"""Models that `torch.jit.script` compiles while hooks of ours hang on them: no part of the program."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch

__all__ = ["keep_out_of_scripts"]

_READERS = ("get_hook_stubs", "infer_concrete_type_builder")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@cache
def keep_out_of_scripts(is_ours: Callable[[Any], bool]) -> None:
    """Let torch's compiler of modules pass over hooks, from now on.

    It compiles every hook on a module, and ends with an error at one that is no function of its language, which none of
    ours can be. Two of its functions read hooks; what stands for them gives them the module without ours.

    Args:
        is_ours: tells of a hook whether it is to be passed over.
    """
    # Private: what is not there is left alone.
    compiler: Any = getattr(torch.jit, "_recursive", None)
    for name in _READERS:
        reader = getattr(compiler, name, None)
        if callable(reader):
            setattr(compiler, name, _without(is_ours, reader))


def _without(is_ours: Callable[[Any], bool], reader: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reader)
    def read(nn_module: Any, *args: Any, **kwargs: Any) -> Any:
        with _taken_off(nn_module, is_ours):
            return reader(nn_module, *args, **kwargs)

    return read


@contextmanager
def _taken_off(module: Any, is_ours: Callable[[Any], bool]) -> Iterator[None]:
    held = vars(module)
    hung = {name: held[name] for name in _HOOKS if any(map(is_ours, (held.get(name) or {}).values()))}
    for name, hooks in hung.items():
        held[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not is_ours(hook))
    try:
        yield
    finally:
        held.update(hung)
