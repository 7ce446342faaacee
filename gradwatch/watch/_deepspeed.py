"""DeepSpeed's engine, which runs backward and steps by itself, as `Watch` takes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .._warn import warn
from ..errors import ConfigError
from ..torchside import StepHook, ZeroPart, engine_of, weakly
from ._settings import Settings
from ._step_inputs import StepInputs
from ._stepper import Stepper, raw_optimizer, steppers

__all__ = ["BeforeStep", "EngineStepper", "check_deepspeed", "describe_engine", "steppers_of"]


class EngineStepper(Stepper):
    """An engine in an optimizer's place: what it accumulates, scales, clips and steps is its own affair.

    Attributes:
        has_stepped: a step has come that nobody announced, and was told to whoever `attach` was given.
    """

    def __init__(self, engine: Any) -> None:
        self.given, self.scaler = engine, None
        self.raw = raw_optimizer(engine.optimizer)
        self._before: BeforeStep | None = None
        self._is_announced = self.has_stepped = False
        self._on_step: Callable[[], object] = lambda: None

    def attach(self, on_step: Callable[[], object]) -> None:
        """Call back ahead of steps that nobody announced."""
        self._on_step, self._before = on_step, BeforeStep(self.given, weakly(self._stepping))

    def detach(self) -> None:
        """Take off what `attach` has put on."""
        if self._before is not None:
            self._before.close()

    def _stepping(self) -> None:
        if not self._is_announced or self.has_stepped:
            self._on_step()
            self.has_stepped = True

    def over(self) -> None:
        """Say that a step is over."""
        self._is_announced = self.has_stepped = False

    @property
    def is_syncing(self) -> bool:
        """Whether `engine.step()` moves anything: it must be called after every micro-batch, and counts them."""
        return bool(self.given.is_gradient_accumulation_boundary())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ConfigError("DeepSpeed's engine takes no closure: call `engine.backward(loss)`, then `watch.step()`.")
        return self.given.step()

    def pass_over(self) -> None:
        # Who sets the boundary by hand (Accelerate does) need not count micro-batches.
        if getattr(self.given, "_is_gradient_accumulation_boundary", None) is None:
            self.given.step()

    def backward(self, loss: Tensor) -> None:
        self.given.backward(loss)

    def describe(self, inputs: StepInputs) -> None:
        """Announce a step, and put on its inputs what the engine does to the gradients."""
        self._is_announced = True
        if not inputs.losses and self._before is not None:
            inputs.losses = list(self._before.losses)
        describe_engine(self.given, inputs)


class BeforeStep:
    """Calls back when a DeepSpeed engine is about to step, and hears the losses that it runs backward on.

    Accelerate, and the Hugging Face Trainer with it, run backward and step in one call, and DeepSpeed has no event in
    between: `backward` and `scale` of the engine, which are given the loss before anything is made of it, and `step`
    of its optimizer are wrapped until `close`. An optimizer of torch's own, as it has without ZeRO, takes a hook; this
    must be the first on it.

    Args:
        engine: the engine.
        on_step: called when gradients lie complete.

    Attributes:
        engine: the engine.
        losses: of the micro-batches since the last step, detached, without any scale.
    """

    def __init__(self, engine: Any, on_step: Callable[[], object]) -> None:
        self.engine = engine
        self.losses: list[Tensor] = []
        self._on_step = on_step
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._handle: Any = None
        optimizer = engine.optimizer
        if isinstance(optimizer, Optimizer):
            self._handle = StepHook.of(self._tell).hang(optimizer.register_step_pre_hook)
            return
        for name in ("backward", "scale"):
            if hasattr(engine, name):
                self._wrap(engine, name, BeforeStep._hear)
        self._wrap(optimizer, "step", BeforeStep._tell)

    def _wrap(self, owner: Any, name: str, first: Callable[..., object]) -> None:
        original, mine = getattr(owner, name), weakref.ref(self)

        @wraps(original)
        def told(*args: Any, **kwargs: Any) -> Any:
            found = mine()
            if found is None:  # the watch is gone, and was not closed
                _unwrap(owner, name, told)
            else:
                first(found, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, told)
        self._wrapped.append((owner, name, told))

    def _hear(self, loss: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append(loss.detach().clone())

    def _tell(self, *args: Any, **kwargs: Any) -> None:
        self._on_step()
        self.losses.clear()

    def close(self) -> None:
        """Take both off; one that somebody else has wrapped since does nothing more."""
        self._on_step = lambda: None
        if self._handle is not None:
            self._handle.remove()
        for wrapped in self._wrapped:
            _unwrap(*wrapped)
        self._wrapped = []


def _unwrap(owner: Any, name: str, told: Any) -> None:
    if vars(owner).get(name) is told:
        delattr(owner, name)


def steppers_of(model: nn.Module, optimizer: Any) -> tuple[Stepper, ...]:
    """Return a stepper for each optimizer that a door was given, or for the DeepSpeed engine that trains the model.

    Raises:
        ConfigError: there is none, or something that is no optimizer, or not the engine's; or the engine runs a
            pipeline.
    """
    engine = engine_of(model)
    if any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__):
        raise ConfigError(
            "DeepSpeed's pipeline engine has other layers on each rank, and gradwatch compares ranks layer by layer: "
            "it can't watch this training."
        )
    if engine is not None and engine.optimizer is not None:
        stepper = EngineStepper(engine)
        for other in () if optimizer is None else steppers(optimizer):
            if other.raw is not stepper.raw:
                raise ConfigError(
                    f"DeepSpeed's engine steps an optimizer of its own: leave `optimizer` out. "
                    f"Got {type(other.given).__name__}, which it does not hold."
                )
        return (stepper,)
    if optimizer is None:
        raise ConfigError(
            "`optimizer` must be a torch optimizer or several; an engine of DeepSpeed alone has its own. Got NoneType."
        )
    return steppers(optimizer)


def describe_engine(engine: Any, inputs: StepInputs) -> None:
    """Put on a step's inputs what an engine does to its gradients: its loss scale, its own clip."""
    scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None or engine.fp16_enabled():
        inputs.scaler = True
        inputs.scale = float(engine.optimizer.loss_scale if scaler is None else scaler.get_scale())
        inputs.grad_scale = inputs.scale
    clip = float(engine.gradient_clipping() or 0.0)
    if clip > 0:
        inputs.clipper = f"DeepSpeed's gradient_clipping={clip:g}"
        inputs.scalars = {**inputs.scalars, "trainer_clip": clip}


def check_deepspeed(part: ZeroPart, settings: Settings, *, treats: bool) -> None:
    """Say what can't be done while DeepSpeed's ZeRO looks after the parameters.

    Raises:
        ConfigError: surgery is asked for, or what runs passes of its own.
    """
    if settings.surgery is not None:
        raise ConfigError(
            "surgery puts gradients together in `.grad`, where DeepSpeed's ZeRO leaves none. Train without "
            "`zero_optimization`, or leave `surgery` out."
        )
    for name in ("autopsy", "noise_scale", "conflicts_every", "recompute_every"):
        if getattr(settings.options, name):
            raise ConfigError(
                f"`{name}` runs backward once more, where DeepSpeed's own hooks would take its gradients for the "
                f"training's. Leave `{name}` out."
            )
    if treats and (why := _why_treated_otherwise(part.zero)):
        warn(why)


def _why_treated_otherwise(zero: Any) -> str:
    """Return why treatments come to something else than they should; "" where they do not."""
    if type(zero).__name__ == "BF16_Optimizer":
        return (
            "DeepSpeed's BF16_Optimizer ends the run by itself where a gradient is not finite, before the step could "
            "be skipped. Without `grad_accum_dtype` of fp32 it does not."
        )
    is_offloaded = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    if not (is_offloaded and getattr(zero, "clip_grad", 0.0) > 0):
        return ""
    return (
        "DeepSpeed notes the norms for its own clip inside backward where optimizer states are offloaded: what a "
        "treatment clips it will clip again by the norm from before. Leave `gradient_clipping` out, or the treatment."
    )
