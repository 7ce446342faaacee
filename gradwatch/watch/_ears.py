"""Where attention is listened to at a step, and what of it can't be seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..torchside import Attended, AttentionTap, clean_path, compiled_parts, weakly
from ._guard import Guard
from ._model_meter import ModelMeter

__all__ = ["Ears"]

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_IN_ROOT = (
    "attention in the model's own forward, outside of any module in it, is not seen: compute it in a module of its own"
)
_UNSEEN = (
    "attention of {} is not seen: it did not run, is compiled, in eval mode within torch's fast path, or computed by a "
    "kernel of its own (flash, flex attention)"
)


@dataclass
class Ears:
    """Listens to the watched modules' attention from `open` to `close`, and then says what was not seen.

    Attributes:
        tell: called with a module's row, its path and the attention.
    """

    meter: ModelMeter
    tell: Callable[[int, str, Attended], object]
    guard: Guard
    _tap: AttentionTap | None = None
    _seen: set[str] = field(default_factory=set)
    _rows: dict[str, int] = field(default_factory=dict)

    def open(self) -> None:
        """Begin to listen; on no module that torch.compile has taken, or around one: it would be compiled anew."""
        meter = self.meter
        modules = dict(meter.model.named_modules())
        watched = {path: modules[meter.real_path(path)] for path in meter.watched.modules if meter.has(path)}
        if tuple(meter.options.paths) == ("*",):
            watched["{root}"] = meter.model
        away = [modules[path] for path in compiled_parts(meter.model) if path in modules] + _fast(meter.model)
        closed = {id(part) for module in away for part in module.modules()}
        if closed:
            around = (m for m in modules.values() if any(id(part) in closed for part in m.modules()))
            closed |= {id(module) for module in around}
        heard = {path: module for path, module in watched.items() if id(module) not in closed}
        self._rows = {path: row for row, path in enumerate(meter.watched.modules)}
        self._tap = AttentionTap(heard, weakly(self._hear), weakly(self._listens, False))
        self._tap.open()

    def _listens(self) -> bool:
        return self.meter.model.training and not self.meter.is_muted()

    def _hear(self, path: str, attended: Attended) -> None:
        if path in self._rows:
            self._seen.add(path)
            self.tell(self._rows[path], path, attended)
        else:
            self.guard.limit(_IN_ROOT, aloud=True)

    def close(self) -> None:
        """Stop listening. May be called twice."""
        if self._tap is None:
            return
        self._tap.close()
        self._tap = None
        missing = _unheard(self.meter.model, self._seen)
        if missing:
            self.guard.limit(_UNSEEN.format(_listed(missing)), aloud=not self._seen)


def _fast(model: nn.Module) -> list[nn.Module]:
    """Return modules of torch's in eval mode, whose fast path a function mode would switch off."""
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
    return [module for module in model.modules() if isinstance(module, kinds) and not module.training]


def _unheard(model: nn.Module, seen: set[str]) -> list[str]:
    """Return the innermost modules that are called attention, and in which nothing known attended."""
    modules = ((clean_path(path), type(module).__name__) for path, module in model.named_modules())
    named = [path for path, kind in modules if path and _ATTENTION.search(kind)]
    inner = [path for path in named if not any(other.startswith(path + ".") for other in named)]
    heard = tuple(seen)
    return [p for p in inner if not any(p == s or p.startswith(s + ".") or s.startswith(p + ".") for s in heard)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
