"""The usual research names (those of TransformerLens) for models that are known by their class names.

Each builder returns name -> `Alias` or `Unavailable` for one model class found at a path; the class is told by its
name, so that nothing needs to be imported for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ._aliases import Alias, Unavailable
from ._names import ModelNames
from ._views import Heads

__all__ = ["research_aliases"]

Meanings = dict[str, Any]
_NO_WEIGHTS = "the attention weights are not computed by {how}; load the model with attn_implementation='eager'"
_FUNCTIONAL = "nn.MultiheadAttention computes it functionally: no module's input or output is this tensor"
_NO_SPLIT = "the model adds all heads up in one matrix product and never holds their results apart"


def research_aliases(names: ModelNames) -> Meanings:
    """Return the research names of every model of a known class within `names`; {} where there is none.

    Where several models of known classes are found, the names of all but the first begin with their path.
    """
    found: Meanings = {}
    taken: list[str] = []
    for path, module in names.modules.items():
        builder = _builder_of(module)
        if builder is None or any(path == t or path.startswith(t + ".") for t in taken if t) or "" in taken:
            continue
        prefix = f"{path}." if found and path else ""
        inside = f"{path}." if path else ""
        for name, meaning in builder(module, inside).items():
            found[prefix + name] = meaning
        taken.append(path)
    return found


def _builder_of(module: nn.Module) -> Callable[[Any, str], Meanings] | None:
    """Return the builder of a known class, itself or a subclass; a user's class that is merely named so is not one."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("torch.nn.", "transformers.")) and kind.__name__ in _BUILDERS:
            return _BUILDERS[kind.__name__]
    return None


def _pattern(model: Any, target: str, block: str) -> Alias | Unavailable:
    how = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if how == "eager":
        return Alias(target, leaf="1", writing="refuse")
    return Unavailable(_NO_WEIGHTS.format(how=repr(how)), where=block)


def _gpt2(model: Any, p: str) -> Meanings:
    h, b = p + "h.{i}", "blocks.{i}."
    heads = model.config.num_attention_heads
    names: Meanings = {
        "hook_embed": Alias(p + "wte:output"),
        "hook_pos_embed": Alias(p + "wpe:output"),
        b + "hook_resid_pre": Alias(h + ":input", leaf="first"),
        b + "ln1.hook_normalized": Alias(h + ".ln_1:output"),
        b + "attn.hook_z": Alias(h + ".attn.c_proj:input", view=Heads(heads)),
        b + "attn.hook_pattern": _pattern(model, h + ".attn:output", h),
        b + "attn.hook_result": Unavailable(_NO_SPLIT, where=h),
        b + "hook_attn_out": Alias(h + ".attn:output", leaf="first"),
        b + "hook_resid_mid": Alias(h + ".ln_2:input", writing="in_place"),
        b + "ln2.hook_normalized": Alias(h + ".ln_2:output"),
        b + "mlp.hook_pre": Alias(h + ".mlp.c_fc:output"),
        b + "mlp.hook_post": Alias(h + ".mlp.act:output"),
        b + "hook_mlp_out": Alias(h + ".mlp:output"),
        b + "hook_resid_post": Alias(h + ":output", leaf="first"),
        "ln_final.hook_normalized": Alias(p + "ln_f:output"),
    }
    for part, letter in enumerate("qkv"):
        names[f"{b}attn.hook_{letter}"] = Alias(h + ".attn.c_attn:output", view=Heads(heads, part=part, parts=3))
    return names


def _llama(model: Any, p: str) -> Meanings:
    layer, b = p + "layers.{i}", "blocks.{i}."
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    rotary = "the model has no positional embedding: positions enter as rotations of queries and keys"
    return {
        "hook_embed": Alias(p + "embed_tokens:output"),
        "hook_pos_embed": Unavailable(rotary),
        b + "hook_resid_pre": Alias(layer + ":input", leaf="first"),
        b + "ln1.hook_normalized": Alias(layer + ".input_layernorm:output"),
        b + "attn.hook_q": Alias(layer + ".self_attn.q_proj:output", view=Heads(heads)),
        b + "attn.hook_k": Alias(layer + ".self_attn.k_proj:output", view=Heads(kv_heads)),
        b + "attn.hook_v": Alias(layer + ".self_attn.v_proj:output", view=Heads(kv_heads)),
        b + "attn.hook_rot_q": Unavailable("queries are rotated in a function, not in a module", where=layer),
        b + "attn.hook_rot_k": Unavailable("keys are rotated in a function, not in a module", where=layer),
        b + "attn.hook_z": Alias(layer + ".self_attn.o_proj:input", view=Heads(heads)),
        b + "attn.hook_pattern": _pattern(model, layer + ".self_attn:output", layer),
        b + "attn.hook_result": Unavailable(_NO_SPLIT, where=layer),
        b + "hook_attn_out": Alias(layer + ".self_attn:output", leaf="first"),
        b + "hook_resid_mid": Alias(layer + ".post_attention_layernorm:input", writing="in_place"),
        b + "ln2.hook_normalized": Alias(layer + ".post_attention_layernorm:output"),
        b + "mlp.hook_pre": Alias(layer + ".mlp.gate_proj:output"),
        b + "mlp.hook_pre_linear": Alias(layer + ".mlp.up_proj:output"),
        b + "mlp.hook_post": Alias(layer + ".mlp.down_proj:input"),
        b + "hook_mlp_out": Alias(layer + ".mlp:output"),
        b + "hook_resid_post": Alias(layer + ":output", leaf="first"),
        "ln_final.hook_normalized": Alias(p + "norm:output"),
    }


def _bert(model: Any, p: str) -> Meanings:
    layer, b = p + "encoder.layer.{i}", "blocks.{i}."
    attn, heads = layer + ".attention.", Heads(model.config.num_attention_heads)
    return {
        "hook_embed": Alias(p + "embeddings.word_embeddings:output"),
        "hook_pos_embed": Alias(p + "embeddings.position_embeddings:output", optional=True),
        "hook_token_type_embed": Alias(p + "embeddings.token_type_embeddings:output", optional=True),
        "hook_full_embed": Alias(p + "embeddings:output"),
        b + "hook_resid_pre": Alias(layer + ":input", leaf="first"),
        b + "attn.hook_q": Alias(attn + "self.query:output", view=heads),
        b + "attn.hook_k": Alias(attn + "self.key:output", view=heads),
        b + "attn.hook_v": Alias(attn + "self.value:output", view=heads),
        b + "attn.hook_z": Alias(attn + "output.dense:input", view=heads),
        b + "attn.hook_pattern": _pattern(model, attn + "self:output", layer),
        b + "attn.hook_result": Unavailable(_NO_SPLIT, where=layer),
        b + "hook_attn_out": Alias(attn + "output.dropout:output"),
        b + "hook_resid_mid": Alias(attn + "output.LayerNorm:input"),
        b + "hook_normalized_resid_mid": Alias(attn + "output.LayerNorm:output"),
        b + "mlp.hook_pre": Alias(layer + ".intermediate.dense:output"),
        b + "mlp.hook_post": Alias(layer + ".intermediate.intermediate_act_fn:output"),
        b + "hook_mlp_out": Alias(layer + ".output.dropout:output"),
        b + "hook_resid_post": Alias(layer + ".output.LayerNorm:input"),
        b + "hook_normalized_resid_post": Alias(layer + ".output.LayerNorm:output"),
        "ln_final.hook_normalized": Unavailable("BERT normalises within each block and has no final norm"),
    }


def _torch_layers(stack: Any, path: str, b: str, *, decoder: bool) -> Meanings:
    """Names of one stack of nn.TransformerEncoderLayer or DecoderLayer; norm first and norm last differ."""
    layer = f"{path}layers.{{i}}"
    first = bool(getattr(stack.layers[0], "norm_first", False))
    last_norm, last_dropout = ("norm3", "dropout3") if decoder else ("norm2", "dropout2")
    names: Meanings = {
        b + "hook_resid_pre": Alias(layer + ":input", leaf="first"),
        b + "hook_attn_out": Alias(layer + ".dropout1:output"),
        b + "mlp.hook_pre": Alias(layer + ".linear1:output"),
        b + "mlp.hook_post": Alias(layer + ".dropout:output"),
        b + "hook_mlp_out": Alias(f"{layer}.{last_dropout}:output"),
    }
    for what in ("q", "k", "v", "z", "pattern", "result"):
        names[f"{b}attn.hook_{what}"] = Unavailable(_FUNCTIONAL, where=layer)
        if decoder:
            names[f"{b}cross_attn.hook_{what}"] = Unavailable(_FUNCTIONAL, where=layer)
    if decoder:
        names[b + "hook_cross_attn_out"] = Alias(layer + ".dropout2:output")
    if first:
        names[b + "ln1.hook_normalized"] = Alias(layer + ".norm1:output")
        names[b + "ln2.hook_normalized"] = Alias(f"{layer}.{last_norm}:output")
        names[b + "hook_resid_mid"] = Alias(f"{layer}.{last_norm}:input", writing="in_place")
        names[b + "hook_resid_post"] = Alias(layer + ":output")
        if decoder:
            names[b + "ln_cross.hook_normalized"] = Alias(layer + ".norm2:output")
    else:
        before_mlp = "norm2" if decoder else "norm1"
        names[b + "hook_resid_mid"] = Alias(f"{layer}.{before_mlp}:input")
        names[b + "hook_normalized_resid_mid"] = Alias(f"{layer}.{before_mlp}:output")
        names[b + "hook_resid_post"] = Alias(f"{layer}.{last_norm}:input")
        names[b + "hook_normalized_resid_post"] = Alias(f"{layer}.{last_norm}:output")
    return names


def _torch_stack(stack: Any, p: str, *, prefix: str = "", decoder: bool = False) -> Meanings:
    kind = type(stack).__name__
    names = _torch_layers(stack, p, prefix + "blocks.{i}.", decoder=decoder)
    embedding = f"nn.{kind} holds no embedding: hook your own by its path"
    names[prefix + "hook_embed"] = names[prefix + "hook_pos_embed"] = Unavailable(embedding)
    if getattr(stack, "norm", None) is not None:
        names[prefix + "ln_final.hook_normalized"] = Alias(p + "norm:output")
    else:
        names[prefix + "ln_final.hook_normalized"] = Unavailable(f"this nn.{kind} was made without a final norm")
    return names


def _transformer(model: Any, p: str) -> Meanings:
    return {
        **_torch_stack(model.encoder, p + "encoder.", prefix="encoder."),
        **_torch_stack(model.decoder, p + "decoder.", prefix="decoder.", decoder=True),
    }


_BUILDERS: dict[str, Callable[[Any, str], Meanings]] = {
    "GPT2Model": _gpt2,
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Qwen2Model": _llama,
    "BertModel": _bert,
    "Transformer": _transformer,
    "TransformerEncoder": _torch_stack,
    "TransformerDecoder": lambda stack, p: _torch_stack(stack, p, decoder=True),
}
