"""TransformerLens: named points, caches, temporary, permanent and backward hooks, aliases, patching."""

import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.hooks import HookManager, mean, patch, scale, zero

from ._base import Net, bert, by_hand, encoder, feature, gpt2, grads, ids, llama, net, raises, same, x

SOURCE = "TransformerLens"
LOGITS = "logits"


def last(out):
    return out.logits[0, -1, 3]


@feature(SOURCE, "run_with_cache: all TL names present gpt2/llama/bert")
def _():
    common = ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln1.hook_normalized"]
    inside = ["hook_q", "hook_k", "hook_v", "hook_z", "hook_attn_scores", "hook_pattern", "hook_result"]
    for model in (gpt2(), llama(), bert()):
        hooks = HookManager(model)
        wanted = [f"blocks.0.{n}" for n in (common if model.config.model_type != "bert" else common[:4])]
        wanted += [f"blocks.0.attn.{n}" for n in inside] + [
            "blocks.0.mlp.hook_pre",
            "blocks.0.mlp.hook_post",
            "hook_embed",
        ]
        _, cache = hooks.run_with_cache(ids(), points=wanted)
        assert all(name in cache for name in wanted)


@feature(SOURCE, "numbers gpt2: each alias torch.equal to hand-written hooks")
def _():
    m = gpt2()
    _, cache = HookManager(m).run_with_cache(ids())
    for alias, path, given in (
        ("hook_resid_pre", "transformer.h.1", True),
        ("hook_resid_mid", "transformer.h.1.ln_2", True),
        ("hook_resid_post", "transformer.h.1", False),
        ("hook_mlp_out", "transformer.h.1.mlp", False),
        ("mlp.hook_pre", "transformer.h.1.mlp.c_fc", False),
        ("hook_attn_out", "transformer.h.1.attn", False),
    ):
        _, wanted = by_hand(m, path, lambda: m(ids()), input=given)
        assert torch.equal(cache[f"blocks.1.{alias}"], wanted), alias
    _, qkv = by_hand(m, "transformer.h.1.attn.c_attn", lambda: m(ids()))
    for letter, wanted in zip("qkv", qkv.chunk(3, -1), strict=True):
        assert torch.equal(cache[f"blocks.1.attn.hook_{letter}"], wanted.unflatten(-1, (4, 8)))


@feature(SOURCE, "numbers llama GQA: q 4 heads k/v 2 heads, z, mlp identity")
def _():
    m = llama()
    _, cache = HookManager(m).run_with_cache(ids())
    shapes = [cache[f"blocks.1.attn.hook_{letter}"].shape[-2:] for letter in "qkvz"]
    assert [tuple(s) for s in shapes] == [(4, 8), (2, 8), (2, 8), (4, 8)]
    gate, up = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_pre_linear"]
    assert torch.equal(cache["blocks.1.mlp.hook_post"], nn.functional.silu(gate) * up)


@feature(SOURCE, "numbers bert: resid & normalised")
def _():
    m = bert()
    _, cache = HookManager(m).run_with_cache(ids())
    _, wanted = by_hand(m, "encoder.layer.1.output.LayerNorm", lambda: m(ids()), input=True)
    assert torch.equal(cache["blocks.1.hook_resid_post"], wanted)
    assert torch.equal(cache["blocks.2.hook_resid_pre"], cache["blocks.1.hook_normalized_resid_post"])


@feature(SOURCE, "names_filter: predicate endswith, list, str")
def _():
    hooks = HookManager(net())
    for points in (lambda name: name.endswith("mlp:output"), [f"blocks.{i}.mlp" for i in range(6)], "blocks.?.mlp"):
        assert len(hooks.run_with_cache(x(), points=points)[1]) == 6


@feature(SOURCE, "names_filter as in TL: lambda name: name.endswith('hook_resid_post')")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points=lambda name: name.endswith("hook_resid_post"))
    assert list(cache) == [f"blocks.{i}.hook_resid_post" for i in range(3)]


@feature(SOURCE, "predicate w/ aliases: lambda p: 'hook_z' in p.aliases...")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids(), points=lambda p: any("hook_z" in alias for alias in p.aliases))
    assert cache["blocks.1.attn.hook_z"].shape == (1, 6, 4, 8)


@feature(SOURCE, "predicate on input-port alias (hook_z)")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points=lambda name: name.endswith("attn.hook_z"))
    assert [t.shape for t in cache.values()] == [(1, 6, 4, 8)] * 3


@feature(SOURCE, "zero-ablate a head at hook_z, equals hand-written")
def _():
    m = gpt2()

    def by_hand_zero(t):
        t = t.clone()
        t[..., 8:16] = 0
        return t

    wanted, _ = by_hand(m, "transformer.h.1.attn.c_proj", lambda: m(ids()).logits, by_hand_zero, input=True)
    found = HookManager(m).run_with_hooks(ids(), hooks=[("blocks.1.attn.hook_z", zero(heads=1))]).logits
    assert torch.equal(found, wanted)


def knock_out(t, point):
    t[..., 0] = 0


def knock_out_and_return(t, point):
    t[..., 0] = 0
    return t


def acts_alike(*names):
    m = gpt2()
    hooks = HookManager(m)
    plain = m(ids()).logits
    for name in names:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                one, two = (
                    hooks.run_with_hooks(ids(), hooks=[(f"blocks.1.{name}", fn)]).logits
                    for fn in (knock_out, knock_out_and_return)
                )
            assert torch.equal(one, two)
            assert not torch.equal(one, plain)


@feature(SOURCE, "in-place without return (TL: None = unchanged? it IS changed in TL)")
def _():
    acts_alike("hook_mlp_out")


@feature(SOURCE, "in-place w/o return at hook_resid_post / hook_q / hook_resid_mid")
def _():
    acts_alike("hook_resid_post", "attn.hook_q", "hook_resid_mid")


@feature(SOURCE, "all-residual patch: resid_post from clean -> logits equal clean")
def _():
    hooks = HookManager(gpt2())
    clean, cache = hooks.run_with_cache(ids())
    found = hooks.run_with_hooks(ids() + 7, hooks=[("blocks.2.hook_resid_post", patch(cache))])
    assert torch.equal(found.logits, clean.logits)


@feature(SOURCE, "resid_mid patch reaches the residual stream (in_place) equals hand-written")
def _():
    hooks = HookManager(gpt2())
    clean, cache = hooks.run_with_cache(ids())
    found = hooks.run_with_hooks(ids() + 7, hooks=[("blocks.2.hook_resid_mid", patch(cache))])
    assert torch.equal(found.logits, clean.logits)


@feature(SOURCE, "sweep: activation patching layer x position; equals hand loop")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids())
    found = hooks.sweep("*.hook_resid_pre", range(6), last, inputs=ids() + 7, source=cache, progress=False)
    hooked = [("blocks.1.hook_resid_pre", patch(cache, positions=[4]))]
    with torch.no_grad():
        assert found.values[1, 4] == float(last(hooks.run_with_hooks(ids() + 7, hooks=hooked)))


@feature(SOURCE, "sweep heads z, all attn; ablations zero; mean")
def _():
    hooks = HookManager(gpt2())
    for intervention in (zero, mean):
        found = hooks.sweep(
            "*.attn.hook_z", heads=range(4), metric=last, inputs=ids(), intervention=intervention, progress=False
        )
        assert found.values.shape == (3, 4)


@feature(SOURCE, "sweep: heads x positions (TL get_act_patch_attn_head_out_by_pos)")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids())
    found = hooks.sweep("*.attn.hook_z", range(6), last, heads=range(4), inputs=ids() + 7, source=cache, progress=False)
    assert sorted(found.values.shape) == [3, 4, 6]


@feature(SOURCE, "sweep metric returning several numbers (vector)")
def _():
    hooks = HookManager(gpt2())
    found = hooks.sweep(
        "*.hook_resid_pre",
        range(6),
        lambda out: out.logits[0, -1, :5],
        inputs=ids(),
        intervention=zero,
        progress=False,
    )
    assert sorted(found.values.shape) == [3, 5, 6]


@feature(SOURCE, "sweep kv heads (GQA): hook_k heads=range(2)")
def _():
    found = HookManager(llama()).sweep(
        "*.attn.hook_k", heads=range(2), metric=last, inputs=ids(), intervention=zero, progress=False
    )
    assert found.values.shape == (3, 2)


@feature(SOURCE, "bwd hook: gradient scaling at resid_post equals hand-written")
def _():
    m = gpt2()
    out = HookManager(m).run_with_hooks(ids(), hooks=[("blocks.0.hook_resid_post:grad_output", scale(0.5))])
    found = grads(m, out.logits.sum())

    def hook(module, args, output):
        (output[0] if isinstance(output, tuple) else output).register_hook(lambda g: g * 0.5)

    handle = m.transformer.h[0].register_forward_hook(hook)
    wanted = grads(m, m(ids()).logits.sum())
    handle.remove()
    assert same(found, wanted)


@feature(SOURCE, "bwd hook via bwd_hooks= as in TL")
def _():
    hooks = HookManager(gpt2())
    hint = str(raises(ConfigError, hooks.run_with_hooks, ids(), bwd_hooks=[("blocks.0.hook_resid_post", print)]))
    assert "Did you mean" in hint
    assert ":grad_output" in hint


@feature(SOURCE, "TL-style hook signature fn(tensor, hook) (keyword 'hook')")
def _():
    seen = []

    def fn(tensor, hook):
        seen.append((hook.name, hook.layer))

    HookManager(gpt2()).run_with_hooks(ids(), hooks=[("blocks.1.hook_resid_post", fn)])
    assert seen == [("blocks.1.hook_resid_post", 1)]


@feature(SOURCE, "cached gradients equal (gradients=...) gpt2 resid_post + hook_z + tied emb")
def _():
    m, kept = gpt2(), {}
    hooks = HookManager(m)
    names = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]
    _, cache = hooks.run_with_cache(ids(), points=names, gradients=lambda out: out.logits.square().sum())
    hooks.observe([f"{n}:grad_output" for n in names], lambda g, p: kept.setdefault(p.name.split(":")[0], g.clone()))
    m(ids()).logits.square().sum().backward()
    assert all(torch.equal(cache.gradients[n], kept[n]) for n in names)


@feature(SOURCE, "add_hook permanent; remove_all spares; including_permanent")
def _():
    hooks = HookManager(net())
    hooks.observe("head", print, permanent=True)
    hooks.observe("embed", print)
    assert (hooks.remove_all(), len(hooks), hooks.remove_all(including_permanent=True), len(hooks)) == (1, 1, 1, 0)


@feature(SOURCE, "context-scoped hooks; nested; exception inside")
def _():
    m = net()
    hooks = HookManager(m)
    with hooks.temporary(("head", zero())):
        raises(ZeroDivisionError, lambda: [None for _ in [0] if 1 / 0])
        with hooks.temporary(("embed", zero())):
            m(x())
        assert len(hooks) == 1
        m(x())
    assert len(hooks) == 0


@feature(SOURCE, "prepend / registration order")
def _():
    m, order = net(), []
    hooks = HookManager(m)
    hooks.observe("head", lambda t, p: order.append(1))
    hooks.observe("head", lambda t, p: order.append(0), prepend=True)
    m(x())
    assert order == [0, 1]


@feature(SOURCE, "aliases as own mapping ({i}) + globs")
def _():
    hooks = HookManager(net(), aliases={"blocks.{i}.hook_mlp": "blocks.{i}.mlp:output"})
    assert list(hooks.run_with_cache(x(), points="*.hook_mlp")[1]) == [f"blocks.{i}.hook_mlp" for i in range(6)]


@feature(SOURCE, "hook.name seen by function added under alias")
def _():
    seen = []
    hooks = HookManager(gpt2())
    hooks.run_with_hooks(ids(), hooks=[("blocks.0.hook_mlp_out", lambda t, p: seen.append(p.name))])
    assert seen == ["blocks.0.hook_mlp_out"]


@feature(SOURCE, "cache conveniences: stack, short names")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids())
    assert cache.stack("blocks.*.hook_resid_post").shape == (3, 1, 6, 32)
    assert torch.equal(cache["resid_post", 1], cache["blocks.1.hook_resid_post"])


@feature(SOURCE, "short names as TL: cache['pattern',0], ['attn_out',0], ['embed'], ['mlp_out',-1]")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points=["*.hook_*", "hook_embed"])
    assert cache["attn_out", 0].shape == (1, 6, 32)
    assert cache["pattern", 0].shape == (1, 4, 6, 6)
    assert torch.equal(cache["embed"], cache["hook_embed"])
    assert torch.equal(cache["mlp_out", -1], cache["blocks.2.hook_mlp_out"])


@feature(SOURCE, "decompose_resid / accumulated_resid / apply_ln_to_stack / logit attrs")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids())
    parts, labels = cache.decompose_resid(return_labels=True)
    assert torch.allclose(parts.sum(0), cache["blocks.2.hook_resid_post"], atol=1e-5)
    assert len(labels) == len(parts)
    assert len(cache.accumulated_resid()) >= 3
    assert cache.apply_ln_to_stack(parts).shape == parts.shape
    assert len(cache.logit_attrs(parts, tokens=3)) == len(parts)


@feature(SOURCE, "attn.hook_result (per-head outputs)")
def _():
    m = gpt2()
    _, cache = HookManager(m).run_with_cache(ids(), points=["*.hook_result", "*.hook_attn_out"])
    whole = cache["blocks.0.attn.hook_result"].sum(-2) + m.transformer.h[0].attn.c_proj.bias
    assert torch.allclose(whole, cache["blocks.0.hook_attn_out"], atol=1e-6)


class Words:
    """A tokenizer as Hugging Face's are called."""

    def __call__(self, text, return_tensors="pt", padding=False):
        lines = [text] if isinstance(text, str) else text
        return {"input_ids": torch.tensor([[len(word) for word in line.split()] for line in lines])}


@feature(SOURCE, "text in: run_with_cache('Hello') (tokenizer)")
def _():
    m = gpt2()
    out, _ = HookManager(m, tokenizer=Words()).run_with_cache("a bb ccc")
    assert torch.equal(out.logits, m(torch.tensor([[1, 2, 3]])).logits)


@feature(SOURCE, "set hook_pattern (edit attention pattern) gpt2 eager")
def _():
    m = gpt2()
    hooks = HookManager(m)

    def uniform(t, point):
        return torch.ones_like(t).tril() / torch.ones_like(t).tril().sum(-1, keepdim=True)

    _, cache = hooks.run_with_cache(ids(), points="blocks.0.attn.hook_v")
    hooked = [("blocks.0.attn.hook_pattern", uniform)]
    _, changed = hooks.run_with_cache(ids(), points="blocks.0.attn.hook_z", hooks=hooked)
    v = cache["blocks.0.attn.hook_v"]
    assert torch.allclose(changed["blocks.0.attn.hook_z"][0, 5], v[0].mean(0), atol=1e-5)


@feature(SOURCE, "edit attention scores / pattern by any means?")
def _():
    hooks = HookManager(gpt2("sdpa"))
    plain = hooks.model(ids()).logits
    hooked = [("blocks.0.attn.hook_attn_scores", lambda t, p: t * 0)]
    assert not torch.allclose(hooks.run_with_hooks(ids(), hooks=hooked).logits, plain)


MORE = "TransformerLens, more"


@feature(MORE, "fwd_hooks= / names_filter= swallowed silently by HF **kwargs")
def _():
    for model in (gpt2(), llama(), bert()):
        hooks = HookManager(model)
        for word in ("fwd_hooks", "bwd_hooks", "hook"):
            assert "Did you mean" in str(raises(ConfigError, hooks.run_with_hooks, ids(), **{word: []}))
        assert "points=" in str(raises(ConfigError, hooks.run_with_cache, ids(), names_filter="*"))


@feature(MORE, "message for hook_attn_scores / hook_scale")
def _():
    hooks = HookManager(gpt2())
    for name in ("blocks.0.attn.hook_attn_scores", "blocks.0.ln1.hook_scale"):
        try:
            hooks.run_with_cache(ids(), points=name)
        except LookupError as error:
            assert "Did you mean" in str(error) or "not available" in str(error)  # noqa: PT017


@feature(MORE, "run_with_hooks grad hooks for param refused w/ reason")
def _():
    m = gpt2()
    hooks = HookManager(m)
    error = raises(ConfigError, hooks.run_with_hooks, ids(), hooks=[("transformer.wte.weight:grad", print)])
    assert "temporary" in str(error)
    with hooks.temporary(("transformer.wte.weight:grad", lambda g, p: g * 0)):
        m(ids()).logits.sum().backward()
    assert not m.transformer.wte.weight.grad.any()


@feature(MORE, "tied embedding lm_head/wte weight: one point other_names")
def _():
    m = gpt2()
    hooks = HookManager(m)
    (point,) = hooks.points("lm_head.weight:grad")
    assert (point.path, point.other_names) == ("transformer.wte.weight", ("lm_head.weight",))


@feature(MORE, "DataParallel/wrapped: names w/o module. prefix, DDP wrapper")
def _():
    hooks = HookManager(nn.DataParallel(gpt2()))
    assert hooks.points("transformer.h.0:output") == ["module.transformer.h.0:output"]


@feature(MORE, "HF wrapper model containing GPT2 (e.g. classification), PEFT-like nesting; 2 models")
def _():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = gpt2(), gpt2()

        def forward(self, tokens):
            return self.a(tokens).logits + self.b(tokens).logits

    _, cache = HookManager(Two()).run_with_cache(ids(), points="*blocks.1.hook_resid_post")
    assert len(cache) == 2


@feature(MORE, "T5, ViT, GPT-NeoX, Gemma, Phi, Mixtral, OPT, DistilBERT, RoBERTa: research names?")
def _():
    import transformers as hf

    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    for kind, settings in {
        "GPTNeoXForCausalLM": {**small, "vocab_size": 50},
        "OPTForCausalLM": {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "ffn_dim": 48,
            "vocab_size": 50,
            "word_embed_proj_dim": 32,
        },
        "DistilBertModel": {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48, "vocab_size": 50},
        "RobertaModel": {**small, "vocab_size": 50, "max_position_embeddings": 40},
    }.items():
        model = getattr(hf, kind)
        torch.manual_seed(0)
        built = model(model.config_class(**settings)).eval()
        names = [
            "blocks.1.hook_resid_pre",
            "blocks.1.attn.hook_q",
            "blocks.1.attn.hook_pattern",
            "blocks.1.attn.hook_z",
        ]
        _, cache = HookManager(built).run_with_cache(ids() + 3, points=names)
        assert len(cache) == 4, kind


_ = (Net, encoder)
