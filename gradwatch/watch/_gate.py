"""The veto: keeps optimizers from moving anything at one step, and proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._warn import one_line
from ..torchside import StepHook, weakly
from ._clean import fires
from ._device_veto import DeviceVeto, LateProof, can_decide_on_device
from ._family import Family
from ._guard import Guard
from ._stepper import raw_optimizer
from ._veto import Glimpse, Proof, Veto

__all__ = ["Gates", "StepGate", "Vetoes"]


@dataclass(frozen=True)
class Vetoes:
    """What the gates of a run have in common.

    Attributes:
        limit_bytes: for copies, at a vetoed step.
        names: of parameters, by their ids.
        tell: told of what came of each vetoed step.
        lowered: whether gradwatch itself changes learning rates for the step.
        possible: whether a veto may come at all.
        in_parts: the optimizer is called several times in one step, of whose end its calls tell nothing.
        parts: what it then moves, in all calls together.
    """

    limit_bytes: int = 256 * 2**20
    names: Callable[[], Mapping[int, str]] = dict
    tell: Callable[[Proof], None] = lambda proof: None
    lowered: Callable[[], bool] = lambda: False
    possible: bool = True
    in_parts: bool = False
    parts: Callable[[], Sequence[Tensor]] = tuple


class StepGate:
    """Vetoes single steps of one optimizer, or of a wrapper and what it holds, and tells when it has stepped.

    A vetoed step runs without gradients, so that schedulers, loss scalers and step counters go on in step; afterwards
    it is proven that parameters, and all that the optimizers remember, are bit for bit as they were, and what is not is
    put back. Of optimizers that are not known to be clean (a wrapper, one of two calls) everything is remembered from
    the moment of the decision; of known ones from the step on.

    Args:
        optimizer: the raw torch optimizer.
        on_stepped: called after each `optimizer.step()` that ran.
        on_stepping: called before each, where gradients lie complete: inside the step, after its closure's backward.
        given: what the user's loop steps.
        vetoes: what all gates have in common.
        begins: called when a step begins.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        on_stepped: Callable[[Optimizer], None] | None = None,
        on_stepping: Callable[[Optimizer], None] | None = None,
        *,
        given: Sequence[Any] = (),
        vetoes: Vetoes | None = None,
        begins: Callable[[StepGate], None] = lambda gate: None,
    ) -> None:
        self.optimizer = optimizer
        self._on_stepped, self._on_stepping = on_stepped, on_stepping
        self._vetoes, self._begins = vetoes or Vetoes(), begins
        self.family = Family(optimizer, given)
        self._pending: bool | Tensor = False
        self._on_device = DeviceVeto(optimizer, self.family)
        self._veto: Veto | None = None
        self._early: Veto | None = None
        self._last: Glimpse | None = None
        self._moves_first = self._in_closure = self._in_hook = self._is_alone = False
        self._depth = 0
        self._has_told = False
        self._num_parts = 0
        self._handles: list[Any] = []
        self.why_open = self._hang()
        self.glimpse()

    def _hang(self) -> str:
        """Put the hooks on; return why they can't be."""
        raw = self.optimizer
        if not self.family.hooked and isinstance(raw, Optimizer) and not fires(raw):
            return f"{type(raw).__name__}'s step calls no hooks"
        try:
            for member in self.family.hooked or (raw,):
                self._handles.append(StepHook.of(self._before).hang(member.register_step_pre_hook))
                self._handles.append(StepHook.of(self._after).hang(member.register_step_post_hook))
        except Exception as error:
            self.close()
            return f"{type(raw).__name__} takes no step hooks ({one_line(error)})"
        return ""

    def arm(self, veto: bool | Tensor) -> None:
        """Set whether the next step is vetoed. Call it at every step, so that no old veto outlives its own."""
        self.over()
        self._is_alone, self._has_told, self._num_parts = self._in_hook, False, 0
        self._pending = veto
        if veto is True and (self.why_open or not self.family.is_clean or self._vetoes.in_parts):
            self._remember()

    def _remember(self) -> None:
        """Remember everything at the moment of the decision: this one may move something by a call that no hook sees.

        Where it is in the midst of its own algorithm, weights are not what they are to be again: gradients of zeros
        must do, and what it makes of them is told, unless a step that can be seen comes after all.
        """
        early, self._early = self._early, None
        self._veto = self._new() if early is None else early
        self._veto.is_late = early is None and self._last is not None and not self._last.still_holds()
        if self._veto.is_late or self.why_open:
            self._veto.hide()

    def arm_on_device(self, veto: Tensor, tell: Callable[[LateProof], object] = lambda proof: None) -> None:
        """Let a fused optimizer decide for itself, from a flag on the device; `tell` gets the proof afterwards. Nobody
        waits for either; of an optimizer that can't, the step waits."""
        can = can_decide_on_device(self.optimizer)
        self._pending = False if can else veto
        if can:
            self._on_device.arm(veto, tell)

    can_arm_on_device = staticmethod(can_decide_on_device)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.over()

    def over(self) -> None:
        """Say that the step is over, with all that came after it; one that raised too: torch calls no hook of ours
        then."""
        if not self._in_closure and not self._in_hook:
            self._depth, self._early = 0, None
        self._pending = False
        veto, self._veto = self._veto, None
        if veto is not None:
            self._vetoes.tell(veto.look_again() if veto.was_settled else veto.settle(is_seen=False))
        if self._on_device.is_armed:
            self._on_device.forget()

    def end_window(self) -> None:
        """Look a last time at what a vetoed step was not to move, where that step has come: another's begins."""
        if self._veto is not None and self._veto.was_settled:
            self.over()

    def glimpse(self) -> None:
        """Remember how some weights look between two steps."""
        seldom = not self._vetoes.possible or self.family.is_clean
        self._last = None if seldom else Glimpse(self.family)

    def _new(self) -> Veto:
        spared = frozenset(("lr",)) if self._vetoes.lowered() else frozenset()
        limit, names, parts = self._vetoes.limit_bytes, self._vetoes.names(), self._vetoes.parts()
        if self._vetoes.in_parts:
            spared |= {"params"}  # which of them its groups show changes from call to call
        return Veto(
            self.family, limit_bytes=limit, name_of=lambda tensor: names.get(id(tensor)), spared=spared, parts=parts
        )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._depth:
            if self._vetoes.possible:
                self._begins(self)
            if self._veto is not None and not (self.family.ends_unseen or self._vetoes.in_parts):
                self.end_window()
        self._depth += 1
        # args[0] is the optimizer itself; under a scaler there is no closure.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._settle()
            return None
        if self._pending is not False or self._veto is not None:
            self._settle()
        elif self._moves_first and self._depth == 1:
            self._early = self._new()
        wrapped = self._wrapped(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            # Lightning's closure runs the whole of forward and backward: the decision falls inside it.
            if self._last is not None and not self._moves_first and self._veto is None:
                self._moves_first = not self._last.still_holds()
            within, self._in_closure = self._in_closure, True
            try:
                result = closure()
            finally:
                self._in_closure = within
            self._settle()
            return result

        return wrapped

    def _settle(self) -> None:
        """Gradients lie complete: the optimizer comes next."""
        is_first = not self._vetoes.in_parts or self._num_parts % max(len(self._vetoes.parts()), 1) == 0
        self._num_parts += 1
        if self._on_stepping is not None and is_first:
            within, self._in_hook = self._in_hook, True
            try:
                self._on_stepping(self.optimizer)
            finally:
                self._in_hook = within
        veto, self._pending = self._pending, False
        if isinstance(veto, Tensor):
            veto = bool(veto)  # a host read: the one wait, announced by the engine where it can't be avoided
        if veto and (self._veto is None or self._veto.is_late):
            if self._veto is not None:
                self._veto.drop()
            self._veto = self._new()
        if self._veto is not None:
            self._veto.hide(in_step=True)
        if self._on_device.is_armed:
            self._on_device.begin()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        self._early = None
        if self._on_device.is_armed:
            self._on_device.end()
        if self._vetoes.in_parts:
            if self._veto is not None:
                self._veto.drop()  # of this part; the proof comes when all of the step is over
            return
        if self._veto is not None:
            self._vetoes.tell(self._veto.settle())
        if self._on_stepped is not None and (self._is_alone or not self.family.ends_unseen):
            self._has_told = True
            # Not the one that called: a wrapper may hand its hooks on to the one inside.
            self._on_stepped(self.optimizer)

    @property
    def tells(self) -> bool:
        """Whether this gate itself tells when the optimizer has stepped, and not whoever called it."""
        if self._vetoes.in_parts:
            return False
        return self._has_told or (not self.why_open and (self._is_alone or not self.family.ends_unseen))


class Gates:
    """The gates of all optimizers of a run; one that turns up later gets its own.

    An optimizer whose step tells nothing of itself stays open: its veto takes hold at the decision, and that is told.

    Args:
        optimizers: raw ones.
        on_stepped: called after each `optimizer.step()` that ran.
        guard: told of those that stay open; `aloud` where a treatment may ask for a veto.
        vetoes: what all gates have in common.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        on_stepped: Callable[[Optimizer], None],
        on_stepping: Callable[[Optimizer], None] | None,
        guard: Guard,
        vetoes: Vetoes | None = None,
    ) -> None:
        self._on_stepped, self._on_stepping = on_stepped, on_stepping
        self._guard, self._vetoes = guard, vetoes or Vetoes()
        self._gates: dict[int, StepGate] = {}
        self._stepping: list[StepGate] = []
        for optimizer in optimizers:
            self._of(optimizer)

    def know(self, given: Iterable[Any]) -> None:
        """Say what the user's loop steps: wrappers write parameters, too, after the optimizers that they hold."""
        for one in given:
            raw = raw_optimizer(one)
            if one is not raw and id(raw) in self._gates:
                self._gates.pop(id(raw)).close()
                self._of(raw, one)

    def _of(self, optimizer: Optimizer, given: Any = None) -> StepGate:
        gate = self._gates.get(id(optimizer))
        if gate is None:
            told = self._on_stepped, self._on_stepping
            around = () if given is None else (given,)
            gate = StepGate(optimizer, *told, given=around, vetoes=self._vetoes, begins=weakly(self._begins))
            self._gates[id(optimizer)] = gate
            if gate.why_open:
                sentence = f"{gate.why_open}: a veto takes hold before it, and what it moves is put back afterwards"
                self._guard.limit(sentence, aloud=self._vetoes.possible)
        return gate

    def _begins(self, begun: StepGate) -> None:
        for gate in self._gates.values():
            if gate is not begun:
                gate.end_window()

    def is_open(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's step tells nothing of itself."""
        return bool((self._gates.get(id(optimizer)) or self._of(optimizer)).why_open)

    def stepped(self) -> None:
        """Say that the optimizers that were armed last have stepped: of some nobody else does."""
        self.over()
        stepping, self._stepping = self._stepping, []
        for gate in stepping:
            if not gate.tells:
                self._on_stepped(gate.optimizer)

    def begin(self) -> None:
        """Say that a step begins: its forward comes next."""
        for gate in self._gates.values():
            gate.glimpse()

    def over(self) -> None:
        """Say that a step is over with all that came after it, one that raised too."""
        for gate in self._gates.values():
            gate.over()

    def can_arm_on_device(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether all of these can decide for themselves, from a flag on the device."""
        if self._vetoes.in_parts:
            return False
        return all(can_decide_on_device(o) and self._of(o).family.is_clean for o in optimizers)

    def arm(self, optimizers: Iterable[Optimizer], veto: bool) -> None:
        """Set whether the next step of these optimizers is vetoed."""
        known, self._stepping = self._gates, []
        for optimizer in optimizers:
            gate = known.get(id(optimizer)) or self._of(optimizer)
            self._stepping.append(gate)
            gate.arm(veto)

    def arm_on_device(self, optimizers: Iterable[Optimizer], veto: Tensor, tell: Callable[[LateProof], object]) -> None:
        """Let fused optimizers decide from a flag on the device; `tell` gets a proof of each when it has stepped."""
        for optimizer in optimizers:
            self._of(optimizer).arm_on_device(veto, tell)

    def close(self) -> None:
        for gate in self._gates.values():
            gate.close()
        self._gates = {}
