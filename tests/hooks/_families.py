"""Tiny random models of many families, and attention hooks written by hand to compare with."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import transformers
from torch.nn import functional

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
USUAL = {**SIZES, **SPECIAL, "max_position_embeddings": 32}
GROUPED = {**USUAL, "num_key_value_heads": 2}
OLD = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 50,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": 50}
IMAGE = {"image_size": 8, "patch_size": 4}
WITHOUT_FFN = {k: v for k, v in SIZES.items() if k != "intermediate_size"}

FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", USUAL),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**OLD, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**WITHOUT_FFN, **OPT}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", USUAL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", USUAL),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **IMAGE}),
}
# How each family's own code takes its projections apart: (path of layer 1's projection, what of its output), by letter.
SEPARATE = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral"), "model.layers.1.self_attn.{}_proj"
    ),
    "gptj": "transformer.h.1.attn.{}_proj",
    "opt": "model.decoder.layers.1.self_attn.{}_proj",
    "distilbert": "distilbert.transformer.layer.1.attention.{}_lin",
    "t5": "decoder.block.1.layer.0.SelfAttention.{}",
    "vit": "vit.layers.1.attention.{}_proj",
}
WORDS = {"q": "query", "k": "key", "v": "value"}
PACKED = {
    "gpt2": ("transformer.h.1.attn.c_attn", lambda out, i: out.split(32, dim=-1)[i].unflatten(-1, (4, 8))),
    "phi3": ("model.layers.1.self_attn.qkv_proj", lambda out, i: out.split([32, 16, 16], -1)[i].unflatten(-1, (-1, 8))),
    "neox": ("gpt_neox.layers.1.attention.query_key_value", lambda out, i: out.unflatten(-1, (4, 24)).chunk(3, -1)[i]),
    "bloom": (
        "transformer.h.1.self_attention.query_key_value",
        lambda out, i: out.unflatten(-1, (4, 3, 8))[..., i, :],
    ),
}


def family(name, attention="eager"):
    """Return a tiny model in eval mode; None where transformers itself has no such attention for it."""
    model, config, sizes = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes, attn_implementation=attention)
    try:
        return getattr(transformers, model)(made).eval()
    except ValueError:
        return None


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    tokens = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
    return {"input_ids": tokens, **({"decoder_input_ids": tokens.flip(0)} if name == "t5" else {})}


def places(name):
    """Return the names of all attentions, in the order in which they are computed."""
    if name != "t5":
        return ["blocks.0.attn", "blocks.1.attn"]
    inner = [f"decoder.blocks.{i}.{what}" for i in (0, 1) for what in ("attn", "cross_attn")]
    return ["encoder.blocks.0.attn", "encoder.blocks.1.attn", *inner]


def projection(name, letter):
    """Return (path, function of the projection's output that gives heads apart) as the model's own code has it."""
    if name in PACKED:
        path, part = PACKED[name]
        return path, lambda out: part(out, "qkv".index(letter))
    if name in ("bert", "roberta"):
        path = f"{name}.encoder.layer.1.attention.self.{WORDS[letter]}"
    else:
        path = SEPARATE[name].format(letter)
    width = 16 if name in ("qwen3", "gemma2", "gemma3") else 8
    return path, lambda out: out.unflatten(-1, (-1, width))


class ByHand:
    """What somebody writes without us: torch's functions replaced while the model runs.

    Attributes:
        seen: one dict for each attention, in order: q, k, v, z as (batch, heads, positions, width), scores, pattern.
        changes: (which attention, what) -> function.
    """

    def __init__(self, changes=()):
        self.seen, self.changes = [], dict(changes)
        self.within = False

    def at(self, what, tensor):
        change = self.changes.get((len(self.seen) - 1, what))
        tensor = tensor if change is None else change(tensor)
        self.seen[-1][what] = tensor.detach().clone()
        return tensor

    def product(self, real, left, right):
        if not self.within:
            self.seen.append({})
            self.within = True
            left = self.at("q", left)
            right = self.at("k", right.transpose(-1, -2)).transpose(-1, -2)
            return real(left, right)
        self.within = False
        return self.at("z", real(left, self.at("v", right)))

    def softmax(self, real, scores, *args, **kwargs):
        if not self.within or scores.dim() < 4:  # a router's
            return real(scores, *args, **kwargs)
        return self.at("pattern", real(self.at("scores", scores), *args, **kwargs))

    def fused(self, real, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        self.seen.append({})
        number = len(self.seen) - 1
        q, k, v = self.at("q", q), self.at("k", k), self.at("v", v)
        if not any((number, what) in self.changes for what in ("scores", "pattern")):
            out = real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            return self.at("z", out)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            bools = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if bools else scores + attn_mask
        pattern = self.at("pattern", self.at("scores", scores).softmax(dim=-1))
        return self.at("z", pattern @ v)


@contextmanager
def by_hand(changes=()):
    hand = ByHand(changes)
    softmax, matmul, bmm = functional.softmax, torch.matmul, torch.bmm
    fused, baddbmm = functional.scaled_dot_product_attention, torch.Tensor.baddbmm
    functional.softmax = lambda *a, **k: hand.softmax(softmax, *a, **k)
    torch.matmul = lambda a, b: hand.product(matmul, a, b)
    torch.bmm = lambda a, b: hand.product(bmm, a, b)
    torch.Tensor.baddbmm = lambda self, batch1, batch2, **k: hand.product(
        lambda a, b: baddbmm(self, a, b, **k), batch1, batch2
    )
    functional.scaled_dot_product_attention = lambda *a, **k: hand.fused(fused, *a, **k)
    try:
        yield hand
    finally:
        functional.softmax, torch.matmul, torch.bmm = softmax, matmul, bmm
        functional.scaled_dot_product_attention, torch.Tensor.baddbmm = fused, baddbmm
