"""The passes of a generation: which columns of the batch each computes, and which rows of it were returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ._points import Point, RawCall

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Passes", "generating"]

_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", 0)
_STATES = ("past_key_values", "cache_params", "state", "past", "mems")
"""Names that models give what they remember of earlier passes."""
_AHEAD = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Settings by which a pass may also try tokens that are a guess."""


class Passes:
    """Which columns of the batch each pass of the model computes, and where each row's first token stands.

    Attributes:
        spans: (begin, end) of the columns of each pass.
        padding: columns of padding before each row's first token, (rows,).
        prompt_length: columns of the prompt, padding included.
        is_beam_search: rows move about between passes.
        chosen: of a beam search, which row of the pass each step of a returned row came from, (returned rows, steps).
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs
        self.spans: list[tuple[int, int]] = []
        self.padding: Tensor | None = None
        self.num_rows = self.prompt_length = 0
        self.given = _given_length(model, args, kwargs)
        self.guesses = any(self._setting(name) is not None for name in _AHEAD)
        self.is_beam_search = (self._setting("num_beams") or 1) > 1
        self.chosen: Tensor | None = None
        self._path: str | None = None
        self._most_columns: int | None = None

    def _setting(self, name: str) -> Any:
        """Return what `generate` goes by: its keyword, its configuration's, the model's."""
        configs = (self.kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        found = (getattr(config, name, None) for config in configs)
        return self.kwargs[name] if name in self.kwargs else next((f for f in found if f is not None), None)

    def __call__(self, raw: RawCall, point: Point) -> None:
        if self._path is None:
            self._path = point.path
        if point.path != self._path:  # a part of what generates, which could generate by itself
            return
        given: dict[Any, Any] = {**dict(enumerate(raw.args)), **raw.kwargs}
        tokens = next((given[n] for n in _TOKENS if isinstance(given.get(n), Tensor)), None)
        if tokens is None:
            raise ConfigError("the model's forward was called without tokens: its passes can't be told apart.")
        begin, length = self._begin(given), int(tokens.shape[1])
        decoding = "decoder_input_ids" in given or "decoder_inputs_embeds" in given
        mask = given.get("decoder_attention_mask" if decoding else "attention_mask")
        if not self.spans:
            self.num_rows, self.prompt_length = int(tokens.shape[0]), self._prompt(begin + length)
            self.padding = _padding(mask, self.num_rows)
        elif tokens.shape[0] != self.num_rows:
            raise ConfigError(f"the batch changed from {self.num_rows} rows to {tokens.shape[0]} while generating.")
        self.spans.append((begin, begin + length))

    def _begin(self, given: Mapping[Any, Any]) -> int:
        """Return how many columns what the model remembers stands for; its name and kind differ between models."""
        lengths = [held.get_seq_length for held in given.values() if callable(getattr(held, "get_seq_length", None))]
        for length in lengths:
            with suppress(ValueError, TypeError, IndexError, NotImplementedError):  # a state, which has no columns
                return int(length())
        remembers = lengths or any(given.get(name) is not None for name in _STATES)
        return self.spans[-1][1] if remembers and self.spans else 0

    def _prompt(self, first_end: int) -> int:
        """Return the prompt's length: the first pass's, unless that is but a part of it, or goes beyond."""
        given = self.given
        return first_end if given is None or (given < first_end and not self.guesses) else given

    @property
    def first_column(self) -> int:
        """The first that was computed: later than 0 where the run began with a cache."""
        return min((begin for begin, _ in self.spans), default=0)

    def of(self, columns: int, device: Any) -> Tensor | None:
        """Return the number of the token in each column of the present pass, (rows, columns); negative for padding."""
        begin, end = self.spans[-1] if self.spans else (0, columns)
        if columns != end - begin:
            return None
        numbers = torch.arange(begin, end, device=device)
        return numbers if self.padding is None else numbers - self.padding.to(device)[:, None]

    def first_generated(self, numbers: Tensor) -> Tensor:
        """Return the number of each row's first generated token; of an encoder's tokens none is generated."""
        if self.padding is None:
            return torch.full((1, 1), numbers.shape[-1], device=numbers.device)
        return (self.prompt_length - self.padding.to(numbers.device))[:, None]

    def settings(self) -> dict[str, Any]:
        """Return what `generate` has to be asked for besides."""
        return {"return_dict_in_generate": True} if self.is_beam_search else {}

    def finish(self, output: Any) -> Any:
        """Take note of what was generated; return it in the form that was asked for."""
        sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if self.is_beam_search:
            self.chosen = getattr(output, "beam_indices", None)
            if self.chosen is None:
                raise ConfigError("the model tells nothing of how its beams moved: hooks go with num_beams=1.")
        if sequences is not None and self.spans and (self.guesses or self.is_beam_search):
            self._end_at(int(sequences.shape[1]))
        asked = self._setting("return_dict_in_generate")
        return sequences if self.is_beam_search and not asked else output

    def _end_at(self, length: int) -> None:
        """Leave out columns that hold a guess which was not taken, or a beam that was not."""
        in_sequences = self.given if self.given is not None and _has_ids(self.kwargs) else 0
        if bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)):
            in_sequences = self.prompt_length
        self._most_columns = self.prompt_length + length - in_sequences - 1

    @property
    def num_columns(self) -> int:
        """Columns up to the last that was computed, of a token that stands in what was generated."""
        computed = max((end for _, end in self.spans), default=0)
        return computed if self._most_columns is None else min(computed, self._most_columns)

    def rows(self, number: int) -> Tensor | None:
        """Return which rows of a pass (from 1) belong to the returned ones, -1 for none; None: each its own."""
        if self.chosen is None:
            return None
        whole = next((i for i, (_, end) in enumerate(self.spans) if end >= self.prompt_length), 0)
        step = max(number - 1 - whole, 0)
        past = step >= self.chosen.shape[1]
        return torch.full_like(self.chosen[:, 0], -1) if past else self.chosen[:, step]


def _has_ids(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("inputs_embeds") is None or kwargs.get("input_ids") is not None


def _given_length(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return the columns of the prompt that `generate` is given; None where an encoder reads it."""
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        return None
    given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    prompt = next((t for t in given if isinstance(t, Tensor) and t.dim() > 1), None)
    return None if prompt is None else int(prompt.shape[1])


def _padding(mask: Any, num_rows: int) -> Tensor:
    """Return how many columns of padding stand before each row's first token."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.zeros(num_rows, dtype=torch.long)
    return (mask != 0).long().cumsum(dim=1).eq(0).sum(dim=1).cpu()


def generating(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward may be that of the passes: an adapter hands on to the model within it."""
    return [m for m in model.modules() if m is model or callable(getattr(type(m), "generate", None))]
