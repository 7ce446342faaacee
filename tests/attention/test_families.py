"""Hugging Face's families are seen and clipped, whichever way they attend."""

import pytest
import torch

from gradwatch import Watch
from gradwatch.attention import AttentionScores
from gradwatch.hooks import HookManager
from gradwatch.treatments import QKClip

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 50}
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 50}, "attn"),
    "llama": ("LlamaForCausalLM", {**SIZE, "num_key_value_heads": 2, "intermediate_size": 64}, "self_attn"),
    "bert": ("BertForMaskedLM", {**SIZE, "intermediate_size": 64}, "attention.self"),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZE, "intermediate_size": 64}, "attention"),
    "falcon": ("FalconForCausalLM", {**SIZE, "multi_query": True}, "self_attention"),
    "opt": ("OPTForCausalLM", {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32}, "self_attn"),
}


def model_of(family, form):
    transformers = pytest.importorskip("transformers")
    name, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = getattr(transformers, name)._from_config(config, attn_implementation=form)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model.train()


def largest(model, tokens, family):
    """Return the largest logit of each head, as the hook layer's own opening shows it."""
    path = next(p for p, _ in model.named_modules() if p.endswith(f".{FAMILIES[family][2]}"))
    was, seen = model.training, []
    with HookManager(model.eval()) as hooks, torch.no_grad():
        hooks.observe(f"{path}:peak", lambda t, p: seen.append(t.amax(dim=0)))
        model(tokens)
    model.train(was)
    return path, torch.stack(seen).amax(dim=0)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_openings_and_come_down_to_the_limit(family, form):
    model, tokens = model_of(family, form), torch.arange(24).reshape(2, 12)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    path, before = largest(model, tokens, family)
    limit = float(before.median())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    options = {"statistics": [AttentionScores(every=1)], "treatments": [QKClip(limit)], "on_error": "raise"}
    with Watch(model, optimizer, rules="observe", **options) as watch:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        watch.step(loss=loss)
    scalars = watch.history[0].scalars
    found = [scalars[f"attention_logit_max/{path}/{head}"] for head in range(4)]
    assert found == pytest.approx(before.tolist(), rel=1e-4)
    _, after = largest(model, tokens, family)
    assert after.max().item() <= limit * (1 + 1e-5)
    below = before <= limit
    assert torch.allclose(after[below], before[below], rtol=1e-4)
