"""What to measure and how often: checked once, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import ConfigError, UnknownNameError
from ..records import TRAINING_KINDS
from ..stats import is_due

__all__ = ["MeasureOptions", "is_due"]

ON_ERROR = ("warn", "raise")
BACKENDS = ("tensor", "full")
SCALES = ("log10", "signed")
_CADENCES = (
    "activations_every",
    "updates_every",
    "histograms_every",
    "conflicts_every",
    "recompute_every",
    "replicas_every",
)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What to measure and how often. All numbers of steps are optimizer steps.

    Args:
        paths: glob pattern or patterns of the parameters and modules to watch; `*` crosses dots.
        every: measure gradient norms (and judge, and log) at one step in this many. Treatments that run on every step
            run on every step all the same.
        activations_every: sample module outputs and grad_outputs at one step in this many, and densely at the very
            beginning (steps 0, 1, 2, 4, 8, 16, 32); None never.
        updates_every: measure update ratios at one step in this many, and at the beginning; None never.
        histograms_every: histograms and details (absmax, zero share) at one step in this many; None never.
        backward: `"tensor"`: gradients at outputs through tensor hooks (bitwise neutral, safe with in-place ops);
            `"full"`: torch's full backward hooks, after a pre-flight.
        memory_limit_mb: what may be held beyond the model.
        on_error: `"warn"`: a failure of gradwatch's own becomes one warning and a disabled part; `"raise"`: it raises.
        histogram_scale: `"log10"` of the magnitude, or `"signed"` values.
        history: records kept at `history`; where they would not fit in a fourth of `memory_limit_mb` fewer, and without
            their histograms but for the latest.
        autopsy: on an incident of a gradient that explodes or is not finite run the same batch again under hooks to say
            where it was born; there, and where the loss jumps, take the batch apart to say which samples carry it.
            Every step then waits for its numbers.
        noise_scale: measure the gradient noise scale, which tells what batch size is worth its price, at one step in 50
            and at the beginning: such a step's batch is run again, for up to ten steps' time.
        recompute_every: run the batch of one step in this many again, and of the first steps, to see whether the same
            batch gives the same gradient; None never. Such a step takes one forward and backward more.
        replicas_every: compare the ranks' weights and reduced gradients bit for bit at one step in this many, where
            there are several; None never.
        fingerprints: know batches again, by a checksum over some of their elements at every step: whether they come in
            the same order over and over.
        local_norms: measure each rank's gradient norm before it is reduced, to name a bad rank.
        conflicts_every: measure conflicts between task losses at one step in this many, without surgery; None never.
        kind: what kind of training it is, which rules follow: `"auto"`: what the model, its loss and its optimizers
            show; or `"supervised"`, `"adversarial"`, `"rl"`, `"bootstrapped"`, `"fine_tuning"`, `"mixture_of_experts"`.
        save_batch: save the batch of the step at which an incident began in the run folder, as safetensors (extra
            `gradwatch[cases]`): of the first incidents of a run. The batches of the recent steps are held for it,
            within a fourth of `memory_limit_mb`.
        stop_on_unproven: end the training where a step that was vetoed moved something, and it can't be put back.
    """

    paths: str | Sequence[str] = "*"
    every: int = 1
    activations_every: int | None = 50
    updates_every: int | None = 50
    histograms_every: int | None = 100
    backward: str = "tensor"
    memory_limit_mb: float = 256
    on_error: str = "warn"
    histogram_scale: str = "log10"
    history: int = 1000
    autopsy: bool = False
    noise_scale: bool = False
    recompute_every: int | None = None
    replicas_every: int | None = 100
    fingerprints: bool = False
    local_norms: bool = False
    conflicts_every: int | None = None
    save_batch: bool = False
    stop_on_unproven: bool = False
    kind: str = "auto"

    def __post_init__(self) -> None:
        _check_steps("every", self.every, optional=False)
        for name in _CADENCES:
            _check_steps(name, getattr(self, name), optional=True)
        _check_steps("history", self.history, optional=False)
        named = (
            ("backward", BACKENDS),
            ("on_error", ON_ERROR),
            ("histogram_scale", SCALES),
            ("kind", ("auto", *TRAINING_KINDS)),
        )
        for name, known in named:
            if getattr(self, name) not in known:
                raise UnknownNameError(f"`{name}`", getattr(self, name), known)
        for name in ("stop_on_unproven", "save_batch", "noise_scale", "fingerprints"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` must be True or False. Got {getattr(self, name)!r}.")
        if self.save_batch and find_spec("safetensors") is None:
            raise ConfigError("`save_batch` writes safetensors files: pip install 'gradwatch[cases]'.")
        if not self.memory_limit_mb > 0:
            raise ConfigError(f"`memory_limit_mb` must be above 0. Got {self.memory_limit_mb}.")
        patterns = [self.paths] if isinstance(self.paths, str) else list(self.paths)
        if not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise ConfigError(f"`paths` must be a glob pattern or several. Got {self.paths!r}.")
        object.__setattr__(self, "paths", tuple(patterns))

    @property
    def memory_limit_bytes(self) -> int:
        return int(self.memory_limit_mb * 2**20)


def _check_steps(name: str, value: object, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        never = " or None (never)" if optional else ""
        raise ConfigError(f"`{name}` must be a number of optimizer steps, 1 or more{never}. Got {value!r}.")
