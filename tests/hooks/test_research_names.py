"""The usual research names on torch's nn.Transformer* and on Hugging Face GPT-2, Llama and BERT, tiny and random."""

import pytest
import torch
from torch import nn

from gradwatch.errors import UnavailablePointError
from gradwatch.hooks import HookManager, patch, scale, zero

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}


def gpt2(attention="eager"):
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(attention="eager"):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=attention)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def bert(attention="eager"):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, attn_implementation=attention)
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


TOKENS = torch.arange(12).reshape(2, 6)
MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


@pytest.fixture(params=MODELS, ids=MODELS)
def family(request):
    return request.param


def cached(model):
    hooks = HookManager(model)
    return (hooks, *hooks.run_with_cache(TOKENS))


def test_residual_stream_adds_up(family):
    _, _, cache = cached(MODELS[family]())
    for i in range(2):
        mid = cache["resid_pre", i] + cache["attn_out", i]
        assert torch.allclose(cache["resid_mid", i], mid, atol=1e-6)
        before = cache[f"blocks.{i}.hook_normalized_resid_mid"] if family == "bert" else cache["resid_mid", i]
        assert torch.allclose(cache["resid_post", i], before + cache["mlp_out", i], atol=1e-6)
    after = "blocks.0.hook_normalized_resid_post" if family == "bert" else "blocks.0.hook_resid_post"
    assert torch.equal(cache["resid_pre", 1], cache[after])


def test_heads_are_apart_and_the_pattern_mixes_values_into_z(family):
    _, _, cache = cached(MODELS[family]())
    assert cache["q", 0].shape == (2, 6, 4, 4)
    values = cache["v", 1]
    assert values.shape == (2, 6, 2 if family == "llama" else 4, 4)
    values = values.repeat_interleave(4 // values.shape[2], dim=2)
    pattern = cache["pattern", 1]
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 6), atol=1e-6)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    assert torch.allclose(cache["z", 1], mixed, atol=1e-6)


def test_embedding_mlp_and_final_norm(family):
    model = MODELS[family]()
    hooks, out, cache = cached(model)
    assert cache["hook_embed"].shape == (2, 6, 16)
    assert cache["post", 0].shape[-1] == (64 if family == "gpt2" else 32)
    if family == "bert":
        with pytest.raises(UnavailablePointError, match="has no final norm"):
            hooks.add("ln_final.hook_normalized", print)
    else:
        assert torch.allclose(model.lm_head(cache["ln_final.hook_normalized"]), out.logits)
        block = model.transformer.h[0].ln_1 if family == "gpt2" else model.model.layers[0].input_layernorm
        assert torch.equal(cache["blocks.0.ln1.hook_normalized"], block(cache["resid_pre", 0]))


def test_an_intervention_at_resid_mid_reaches_both_branches(family):
    """The residual branch shares the tensor: changing only what the norm sees would be half an intervention."""
    model = MODELS[family]()
    hooks, out, cache = cached(model)
    other = torch.randn(2, 6, 16)
    _, changed = hooks.run_with_cache(TOKENS, hooks=[("blocks.0.hook_resid_mid", patch(other))])
    assert torch.equal(changed["resid_mid", 0], other)
    if family == "bert":
        wanted = changed["blocks.0.hook_normalized_resid_mid"] + changed["mlp_out", 0]
    else:
        wanted = other + changed["mlp_out", 0]
    assert torch.allclose(changed["resid_post", 0], wanted, atol=1e-6)
    again = hooks.run_with_hooks(TOKENS, hooks=[("blocks.0.hook_resid_mid", patch(cache))])
    assert torch.allclose(again.logits, out.logits, atol=1e-6)


def test_ablating_a_head_equals_zeroing_its_columns(family):
    model = MODELS[family]()
    hooks = HookManager(model)
    ablated = hooks.run_with_hooks(TOKENS, hooks=[("blocks.1.attn.hook_z", zero(heads=2))]).logits
    into = {
        "gpt2": lambda: model.transformer.h[1].attn.c_proj.weight.data[8:12],
        "llama": lambda: model.model.layers[1].self_attn.o_proj.weight.data[:, 8:12],
        "bert": lambda: model.bert.encoder.layer[1].attention.output.dense.weight.data[:, 8:12],
    }[family]()
    into.zero_()
    assert torch.allclose(model(TOKENS).logits, ablated, atol=1e-6)


def test_keys_of_one_head_are_written_back(family):
    model = MODELS[family]()
    hooks, out, cache = cached(model)
    _, changed = hooks.run_with_cache(TOKENS, hooks=[("blocks.0.attn.hook_k", scale(2.0, heads=1))])
    assert torch.allclose(changed["k", 0][:, :, 1], 2 * cache["k", 0][:, :, 1])
    assert torch.equal(changed["k", 0][:, :, 0], cache["k", 0][:, :, 0])
    assert torch.equal(changed["v", 0], cache["v", 0])
    same = hooks.run_with_hooks(TOKENS, hooks=[("*.attn.hook_[qkvz]", lambda t, p: t.clone())])
    assert torch.allclose(same.logits, out.logits, atol=1e-6)


def test_gradients_at_research_names(family):
    """The gradient at an aliased input is the total over its consumers, and interventions on it act."""
    model = MODELS[family]()
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(TOKENS, gradients=lambda out: out.logits.square().sum())
    seen = {}
    names = ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.attn.hook_q", "blocks.0.hook_resid_post"]
    for name in names:
        hooks.add(f"{name}:grad_output", lambda g, p: seen.setdefault(p.name.removesuffix(":grad_output"), g))
    model(TOKENS).logits.square().sum().backward()
    for name in names:
        assert torch.allclose(seen[name], cache.gradients[name], atol=1e-6), name
        assert torch.equal(cache[f"{name}:grad_output"], cache.gradients[name])
    assert seen["blocks.1.attn.hook_z"].shape == (2, 6, 4, 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_pattern_can_be_changed_whichever_way_it_is_computed(family, attention):
    model = MODELS[family](attention)
    hooks = HookManager(model)
    out = hooks.run_with_hooks(TOKENS, hooks=[("blocks.1.attn.hook_pattern", zero(heads=2))])
    by_z = hooks.run_with_hooks(TOKENS, hooks=[("blocks.1.attn.hook_z", zero(heads=2))])
    assert torch.allclose(out.logits, by_z.logits, atol=1e-6)
    assert not torch.allclose(out.logits, model(TOKENS).logits, atol=1e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    hooks = HookManager(model)
    out, cache = hooks.run_with_cache(x)
    mid = cache["resid_pre", 1] + cache["attn_out", 1]
    assert torch.allclose(cache["resid_mid", 1], mid, atol=1e-6)
    before = mid if norm_first else cache["blocks.1.hook_normalized_resid_mid"]
    assert torch.allclose(cache["resid_post", 1], before + cache["mlp_out", 1], atol=1e-6)
    assert torch.equal(cache["ln_final.hook_normalized"], out)
    assert torch.equal(cache["post", 0], cache["pre", 0].relu())
    other = torch.randn_like(x)
    _, changed = hooks.run_with_cache(x, hooks=[("blocks.0.hook_resid_mid", patch(other))])
    before = other if norm_first else changed["blocks.0.hook_normalized_resid_mid"]
    assert torch.allclose(changed["resid_post", 0], before + changed["mlp_out", 0], atol=1e-6)


def test_torch_attention_is_open_too_and_what_is_missing_is_listed():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    hooks = HookManager(model)
    listed = {str(p): p.reason for p in hooks.points("*hook_*") if not p.available}
    assert "encoder.blocks.0.attn.hook_rot_q" in listed
    assert "encoder.blocks.0.ln1.hook_scale" in listed
    with pytest.raises(UnavailablePointError, match="holds no embedding"):
        hooks.add("encoder.hook_embed", print)
    _, cache = hooks.run_with_cache(torch.randn(1, 3, 8), torch.randn(1, 4, 8))
    assert cache["decoder.blocks.0.hook_cross_attn_out"].shape == (1, 4, 8)
    assert cache["decoder.blocks.0.hook_resid_post"].shape == (1, 4, 8)
    assert cache["decoder.blocks.0.cross_attn.hook_pattern"].shape == (1, 2, 4, 3)
    assert cache["encoder.blocks.0.attn.hook_result"].shape == (1, 3, 2, 8)


def test_names_that_are_not_wanted_can_be_left_out():
    hooks = HookManager(gpt2(), research_names=False)
    assert not [p for p in hooks.points("*") if "hook_" in p]


def test_a_users_class_of_a_known_name_is_not_taken_for_it():
    class Transformer(nn.Linear):
        pass

    class Mine(nn.TransformerEncoder):
        pass

    assert not [p for p in HookManager(Transformer(2, 2)).points("*") if "hook_" in p]
    mine = Mine(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1, enable_nested_tensor=False)
    assert HookManager(mine).add("blocks.0.hook_resid_post", print).points[0].path == "layers.0.norm2"
