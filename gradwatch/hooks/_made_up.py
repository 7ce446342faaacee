"""Inputs for trying a forward pass, made up from what a model says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["made_up_inputs"]

_BATCH, _POSITIONS = 2, 5


def made_up_inputs(module: nn.Module) -> tuple[Sequence[Any], Mapping[str, Any]] | None:
    """Return (args, kwargs) for a model of torch's or Hugging Face's kind; None for others."""
    if isinstance(module, nn.Transformer):
        states = _states(module, module.d_model)
        return (states, states.clone()), {}
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        states = _states(module, _width_of(module))
        return ((states,) if isinstance(module, nn.TransformerEncoder) else (states, states.clone())), {}
    if hasattr(type(module), "main_input_name") and hasattr(type(module), "dummy_inputs"):
        return _hugging_face(module)
    return None


def _width_of(stack: Any) -> int:
    width: int = stack.layers[0].self_attn.embed_dim
    return width


def _like(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return parameter.device, parameter.dtype


def _states(module: nn.Module, width: int) -> Tensor:
    device, dtype = _like(module)
    shape = (_BATCH, _POSITIONS, width)
    numbers = torch.arange(_BATCH * _POSITIONS * width, device=device, dtype=torch.float32)
    return (numbers * 0.7).sin().reshape(shape).to(dtype)


def _hugging_face(module: Any) -> tuple[Sequence[Any], Mapping[str, Any]] | None:
    config, main = getattr(module, "config", None), module.main_input_name
    device, dtype = _like(module)
    if main == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            return None
        shape = (_BATCH, channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
        numbers = torch.arange(_BATCH * channels * shape[-1] * shape[-2], device=device, dtype=torch.float32)
        return (), {"pixel_values": (numbers * 0.7).sin().reshape(shape).to(dtype)}
    if main != "input_ids":
        return None
    tokens = _tokens(config).to(device)
    given = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens.flip(0)
    return (), given


def _tokens(config: Any) -> Tensor:
    """Return ids that are no special ones, that are not all alike, and do not count up."""
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id")
    special = {getattr(holder, name, None) for holder in (config, texts) for name in names}
    size = int(getattr(texts, "vocab_size", 16) or 16)
    usual = [i for i in range(min(size, 64)) if i not in special] or [0]
    numbers = [usual[(5 * i * i + 3 * i + 1) % len(usual)] for i in range(_BATCH * _POSITIONS)]
    return torch.tensor(numbers).reshape(_BATCH, _POSITIONS)
