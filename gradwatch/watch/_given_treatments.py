"""What is given as `treatments=`: objects, or the names of those that need no settings; all else is told its cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from ..errors import ConfigError, UnknownNameError, plain_name
from ..protocols import Action, Treatment, as_treatment
from ..treatments import ACTIONS, TREATMENTS, MicroBatchSurgery, Surgery

__all__ = ["given_treatments"]

_ELSEWHERE = {
    "agc": "adaptive_clip",
    "clip": "clip_by_global_norm",
    "clipgradnorm": "clip_by_global_norm",
    "clipgradvalue": "clip_by_value",
    "clipgrads": "clip_by_global_norm",
    "gradclip": "clip_by_global_norm",
    "gradientclipping": "clip_by_global_norm",
    "gradientclip": "clip_by_global_norm",
    "gradientclipval": "clip_by_global_norm",
    "skip": "skip_step",
    "skipnan": "skip_step",
}
"""What these go by in other places -> here."""
_SURGERY = "surgery is no treatment of finished gradients: give it as `surgery=`"


def given_treatments(given: Any) -> tuple[Treatment, ...]:
    """Return the treatments for every step.

    Raises:
        ConfigError: something else was given; says what to write instead.
    """
    if given is None:
        return ()
    if isinstance(given, (str, Mapping, type)) or not isinstance(given, Iterable):
        given = [given]
    return tuple(_named(item) if isinstance(item, str) else _made(item) for item in given)


def _made(item: Any) -> Treatment:
    if isinstance(item, (Surgery, MicroBatchSurgery)):
        raise ConfigError(f"{_SURGERY}. Got {item!r}.")
    if isinstance(item, Action):
        raise ConfigError(f"{item.name} is an action, which runs where a rule fires: NonFinite(then={item!r}).")
    if isinstance(item, Mapping) and len(item) == 1 and isinstance(name := next(iter(item)), str):
        raise ConfigError(f"`treatments` takes objects. Got {dict(item)!r}. {_cure(name, item[name])}")
    return as_treatment(item)


def _named(text: str) -> Treatment:
    name, bracket, rest = text.strip().partition("(")
    if text in TREATMENTS and text not in ("surgery", "micro_batch_surgery") and not _needed(TREATMENTS[text]):
        return as_treatment(TREATMENTS[text]())
    if bracket:
        raise ConfigError(
            f"`treatments` takes objects, not their source. Got {text!r}. {_cure(name, rest.rstrip(')'))}"
        )
    known = _known(name)
    if known is None:
        raise UnknownNameError("treatment", text, TREATMENTS)
    if known in TREATMENTS and known not in ("surgery", "micro_batch_surgery") and not _needed(TREATMENTS[known]):
        raise ConfigError(f"there is no treatment {text!r}. Did you mean {known!r}?")
    raise ConfigError(f"{text!r} is not enough to say which treatment is meant. {_cure(name, None)}")


def _known(name: str) -> str | None:
    """Return what a treatment or an action is called, however its name is spelt; None where there is none."""
    plain = plain_name(name)
    if plain in _ELSEWHERE:
        return _ELSEWHERE[plain]
    return next((known for known in (*TREATMENTS, *ACTIONS) if plain_name(known) == plain), None)


def _cure(name: str, settings: Any) -> str:
    known = _known(name)
    if known is None:
        return str(UnknownNameError("treatment", name, TREATMENTS))
    if known in ACTIONS:
        return f"It is an action, which runs where a rule fires: NonFinite(then={ACTIONS[known].__name__}(...))."
    if known in ("surgery", "micro_batch_surgery"):
        return f"{_SURGERY[0].upper()}{_SURGERY[1:]}."
    cls = TREATMENTS[known]
    if isinstance(settings, str) and settings:
        inside = settings
    elif isinstance(settings, Mapping) and settings:
        inside = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    elif isinstance(settings, (int, float)):
        inside = repr(settings)
    else:
        inside = ", ".join(f"{setting}=..." for setting in _needed(cls))
    written = f"{cls.__name__}({inside})"
    return f"Write treatments=[{written}], with `from gradwatch.treatments import {cls.__name__}`."


def _needed(cls: type) -> list[str]:
    """Return the settings that a treatment can't be made without."""
    if not is_dataclass(cls):
        return []
    return [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
