"""Inputs for trying a forward pass, made up from what a model says of itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "made_up_inputs"]

_BATCH, _POSITIONS = 2, 5


Inputs = tuple[Sequence[Any], Mapping[str, Any]]


def made_up_inputs(module: nn.Module) -> list[Inputs]:
    """Return (args, kwargs) for a model of torch's or Hugging Face's kind, one to be tried after another."""
    if isinstance(module, nn.Transformer):
        states = _states(module, module.d_model)
        return [((states, states.clone()), {})]
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        states = _states(module, _width_of(module))
        return [((states,) if isinstance(module, nn.TransformerEncoder) else (states, states.clone()), {})]
    if hasattr(type(module), "main_input_name") and hasattr(type(module), "dummy_inputs"):
        return _hugging_face(module)
    return []


def _width_of(stack: Any) -> int:
    width: int = stack.layers[0].self_attn.embed_dim
    return width


def _like(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return parameter.device, parameter.dtype


def _states(module: nn.Module, width: int) -> Tensor:
    return _waves(module, (_BATCH, _POSITIONS, width))


def _hugging_face(module: Any) -> list[Inputs]:
    config, main = getattr(module, "config", None), module.main_input_name
    known = inspect.signature(module.forward).parameters
    made = {name: make(module, config) for name, make in _MAKERS.items() if name == main or name in known}
    given = {name: tensor for name, tensor in made.items() if tensor is not None}
    if main not in given:
        return []
    decoding = {}
    if getattr(config, "is_encoder_decoder", False):
        decoding = {"decoder_input_ids": _tokens(config).flip(0).to(given[main].device)}
    ways: list[Inputs] = [((), {main: given[main], **decoding})]
    return ways if len(given) == 1 else [*ways, ((), {**given, **decoding})]


def _waves(module: nn.Module, shape: Sequence[int]) -> Tensor:
    device, dtype = _like(module)
    numbers = torch.arange(math.prod(shape), device=device, dtype=torch.float32)
    return (numbers * 0.7).sin().reshape(tuple(shape)).to(dtype)


def _ids(module: nn.Module, config: Any) -> Tensor:
    return _tokens(config).to(_like(module)[0])


def _picture(module: nn.Module, config: Any) -> Tensor | None:
    holders = (config, getattr(config, "vision_config", None))
    holder = next((h for h in holders if getattr(h, "image_size", None) is not None), None)
    if holder is None:
        return None
    size, channels = holder.image_size, getattr(holder, "num_channels", 3)
    return _waves(module, (_BATCH, channels, *(size if isinstance(size, (tuple, list)) else (size, size))))


def _spectrum(module: nn.Module, config: Any) -> Tensor | None:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return None if bins is None or positions is None else _waves(module, (_BATCH, bins, 2 * positions))


def _sound(module: nn.Module, config: Any) -> Tensor | None:
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not (isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple))):
        return None
    length = 2 * _POSITIONS
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        length = (length - 1) * stride + kernel
    return _waves(module, (_BATCH, length))


_MAKERS: dict[str, Callable[[Any, Any], Tensor | None]] = {
    "input_ids": _ids,
    "pixel_values": _picture,
    "input_features": _spectrum,
    "input_values": _sound,
}


def _tokens(config: Any) -> Tensor:
    """Return ids that are no special ones, that are not all alike, and do not count up."""
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id")
    special = {getattr(holder, name, None) for holder in (config, texts) for name in names}
    size = int(getattr(texts, "vocab_size", 16) or 16)
    usual = [i for i in range(min(size, 64)) if i not in special] or [0]
    numbers = [usual[(5 * i * i + 3 * i + 1) % len(usual)] for i in range(_BATCH * _POSITIONS)]
    return torch.tensor(numbers).reshape(_BATCH, _POSITIONS)
