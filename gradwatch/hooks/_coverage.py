"""Which hooks fired, and why the others did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..torchside import compiled_parts
from ._hook import Entry, Hook

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["Coverage", "PointCoverage", "compiled_parts", "why_not"]


@dataclass(frozen=True)
class PointCoverage:
    """One hook at one point.

    Attributes:
        hook_id: which hook.
        point: its name.
        fired: how often it fired, recomputed passes not counted.
        kind: "fired", or why not: "disabled", "module replaced", "compiled away", "never called", "output type",
            "no gradient", "condition".
        reason: the same as a sentence.
    """

    hook_id: str
    point: str
    fired: int
    kind: str
    reason: str


class Coverage(Sequence[PointCoverage]):
    """One entry for each hook and point. `str(coverage)` is a table."""

    def __init__(self, entries: list[PointCoverage]) -> None:
        self._entries = entries

    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PointCoverage]:
        return iter(self._entries)

    @property
    def silent(self) -> list[PointCoverage]:
        """Those that never fired."""
        return [entry for entry in self._entries if not entry.fired]

    @property
    def is_complete(self) -> bool:
        return not self.silent

    def __str__(self) -> str:
        if not self._entries:
            return "no hooks"
        width = max(len(e.point) for e in self._entries)
        ids = max(len(e.hook_id) for e in self._entries)
        return "\n".join(f"{e.hook_id:{ids}}  {e.point:{width}}  {e.fired:6d}  {e.reason}" for e in self._entries)

    __repr__ = __str__


def coverage(manager: HookManager) -> Coverage:
    """See `HookManager.coverage`."""
    compiled = compiled_parts(manager.model)
    return Coverage([_judge(manager, hook, entry, compiled) for hook in manager.hooks for entry in hook.entries])


def _judge(manager: HookManager, hook: Hook, entry: Entry, compiled: list[str]) -> PointCoverage:
    kind, reason = ("fired", f"fired {entry.fired} times") if entry.fired else why_not(manager, hook, entry, compiled)
    if entry.fired and entry.spot.port in ("input", "output", "grad_output") and _is_replaced(manager, entry):
        reason += "; the module has been replaced since, the new one is not hooked"
    return PointCoverage(hook.id, entry.spot.name, entry.fired, kind, reason)


def _is_replaced(manager: HookManager, entry: Entry) -> bool:
    names: Any = manager.model.named_parameters if entry.spot.is_parameter else manager.model.named_modules
    return all(value is not entry.spot.target for _, value in names(remove_duplicate=False))


def why_not(manager: HookManager, hook: Hook, entry: Entry, compiled: list[str]) -> tuple[str, str]:
    spot = entry.spot
    if not hook.is_enabled:
        return "disabled", "the hook is disabled"
    if _is_replaced(manager, entry):
        what = "parameter" if spot.is_parameter else "module"
        return "module replaced", f"the {what} at {spot.path!r} is another one now: add the hook again"
    if spot.is_parameter:
        return _parameter_reason(entry)
    if not entry.seen:
        return _uncalled_reason(manager, entry, compiled)
    if entry.note and spot.port != "grad_input":
        return "output type", entry.note
    if spot.port in ("grad_output", "grad_at_input", "grad_input"):
        return _gradient_reason(entry)
    if hook.options.when is not None:
        return "condition", "its `when` never held"
    return "output type", f"there is no leaf {hook.options.leaf!r}" if hook.options.leaf else "there was no tensor"


def _parameter_reason(entry: Entry) -> tuple[str, str]:
    if not entry.spot.target.requires_grad:
        return "no gradient", "the parameter does not require a gradient"
    if entry.spot.port == "accumulated_grad":
        return "no gradient", "no backward has accumulated into it (torch.autograd.grad does not)"
    return "no gradient", "no backward has reached it"


def _uncalled_reason(manager: HookManager, entry: Entry, compiled: list[str]) -> tuple[str, str]:
    path = entry.spot.path
    inside = [p for p in compiled if p in ("", path) or path.startswith(p + ".")]
    if inside:
        return (
            "compiled away",
            "the module is compiled and was traced without the hook: torch.compiler.reset(), or hook first",
        )
    hook = entry.hook
    if hook.options.every > 1 and manager.step % hook.options.every:
        return "condition", f"no forward pass has come at a multiple of {hook.options.every} steps"
    parent = path.rpartition(".")[0]
    owner = manager._resolver.names.modules.get(parent)
    if isinstance(owner, nn.MultiheadAttention):
        return "never called", "nn.MultiheadAttention uses this module's weight in a function and never calls it"
    return "never called", "the module's forward has not been called (model.forward(x) or a function may go past it)"


def _gradient_reason(entry: Entry) -> tuple[str, str]:
    if entry.spot.port == "grad_input":
        if entry.placed:
            return "no gradient", "none of its inputs requires a gradient"
        return "no gradient", "no backward, or its output is a type that torch's full backward hooks do not follow"
    if entry.placed:
        return "no gradient", "no backward has reached it"
    return "no gradient", "what it gave out does not require a gradient (no_grad, frozen, or no floating tensor)"
