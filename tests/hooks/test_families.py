"""Attention laid open in every family, equal to hooks written by hand. Two families are light, the rest slow."""

import pytest
import torch

from gradwatch.hooks import HookManager

transformers = pytest.importorskip("transformers")

from ._families import FAMILIES, by_hand, family, inputs, places, projection  # noqa: E402

LIGHT = ("gpt2", "llama")
ALL = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
PORTS = ("q", "k", "v", "scores", "pattern", "z")


@pytest.fixture(params=["eager", "sdpa"])
def how(request):
    return request.param


@pytest.fixture(params=ALL)
def name(request):
    return request.param


@pytest.fixture
def model(name, how):
    made = family(name, how)
    if made is None:
        pytest.skip(f"transformers has no {how} attention for {name}")
    return made


def loss(output):
    return output.logits.square().mean()


def in_usual_form(seen, what, shape):
    """Return a tensor as the model holds it in the form that hooks show: of grouped keys each once."""
    tensor = seen[what]
    if what in ("scores", "pattern"):
        return tensor.reshape(shape)
    heads = shape[2]
    apart = tensor.reshape(shape[0], -1, *tensor.shape[-2:])
    return apart[:, :: apart.shape[1] // heads].transpose(1, 2)


def test_every_name_that_a_family_offers_is_in_its_cache_and_the_run_is_untouched(name, model):
    hooks = HookManager(model)
    wanted = model(**inputs(name)).logits
    output, cache = hooks.run_with_cache(**inputs(name))
    assert torch.equal(output.logits, wanted)
    offered = [p for p in hooks.points("*") if p.available and "hook_" in p]
    assert [p for p in offered if p not in cache] == []
    assert len(offered) > 30
    refused = [p for p in hooks.points("*") if not p.available]
    assert all(len(p.reason) > 10 for p in refused)


def test_what_attention_is_made_of_equals_what_is_caught_by_hand(name, model):
    with by_hand() as hand:
        model(**inputs(name))
    hooks = HookManager(model)
    paths = {place: hooks.points(f"{place}.hook_pattern")[0].path for place in places(name)}
    points = [f"{path}:{port}" for path in paths.values() for port in PORTS]
    _, cache = hooks.run_with_cache(**inputs(name), points=points)
    for (place, path), seen in zip(paths.items(), hand.seen, strict=True):
        for port in PORTS:
            if port in seen:  # no hand reaches into the fused function
                value = cache[f"{path}:{port}"]
                assert torch.equal(value, in_usual_form(seen, port, value.shape)), (place, port)


def test_attention_adds_up(name, model):
    """Scores make the pattern, the pattern mixes values into z, and the heads' results are the output."""
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(**inputs(name))
    for place in places(name):
        pattern, values = cache[f"{place}.hook_pattern"], cache[f"{place}.hook_v"]
        assert torch.equal(cache[f"{place}.hook_attn_scores"].softmax(dim=-1), pattern)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        assert torch.allclose(cache[f"{place}.hook_z"], mixed, atol=1e-6)
        point = hooks.points(f"{place}.hook_result")[0]
        bias = point.module.bias if getattr(point.module, "bias", None) is not None else 0
        total = cache[f"{place}.hook_result"].sum(dim=2) + bias
        assert torch.allclose(total, cache[f"{point.path}:output"].reshape(total.shape), atol=1e-6)


def test_queries_keys_and_values_are_the_projections_parts(name, model):
    place = "decoder.blocks.1.attn" if name == "t5" else "blocks.1.attn"
    hooks = HookManager(model)
    for letter in "qkv":
        path, part = projection(name, letter)
        seen = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        _, cache = hooks.run_with_cache(**inputs(name), points=f"{place}.hook_{letter}")
        handle.remove()
        assert torch.equal(cache[f"{place}.hook_{letter}"], part(seen[0]))

        def by_hand_doubled(m, args, out, part=part):
            out = out.clone()
            part(out)[:, :3] *= 1.5
            return out

        def doubled(t, p):
            t = t.clone()
            t[:, :3] *= 1.5
            return t

        handle = model.get_submodule(path).register_forward_hook(by_hand_doubled)
        with torch.no_grad():  # autograd lets nobody change one part of several in place
            wanted = model(**inputs(name)).logits
            handle.remove()
            changed = hooks.run_with_hooks(**inputs(name), hooks=[(f"{place}.hook_{letter}", doubled)]).logits
        assert torch.equal(changed, wanted), letter
        assert not torch.equal(changed, model(**inputs(name)).logits)


def softer(t):
    return t * 0.5  # exact: a change of each of a group's heads, and of the one that they share, round alike


def test_a_change_equals_the_same_change_by_hand_in_output_and_gradients(name, model):
    number = len(places(name)) - 1
    parameters = list(model.parameters())
    hooks = HookManager(model)
    path = hooks.points(f"{places(name)[number]}.hook_pattern")[0].path
    untouched = model(**inputs(name)).logits
    for port in PORTS:
        with by_hand({(number, port): softer}):
            output = model(**inputs(name))
        wanted = torch.autograd.grad(loss(output), parameters, allow_unused=True)
        changed = hooks.run_with_hooks(**inputs(name), hooks=[(f"{path}:{port}", lambda t, p: softer(t))])
        assert torch.equal(changed.logits, output.logits), port
        assert not torch.equal(changed.logits, untouched), port
        found = torch.autograd.grad(loss(changed), parameters, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), port


def test_gradients_equal_those_of_the_tensors_caught_by_hand(name, model):
    number = len(places(name)) - 1
    caught = {}

    def keep(what):
        def kept(tensor):
            tensor.register_hook(lambda grad: caught.__setitem__(what, grad))
            return tensor

        return kept

    changes = {(number, what): keep(what) for what in PORTS}
    with by_hand(changes):
        loss(model(**inputs(name))).backward()
    hooks = HookManager(model)
    path = hooks.points(f"{places(name)[number]}.hook_pattern")[0].path
    points = [f"{path}:{port}" for port in PORTS]
    _, cache = hooks.run_with_cache(**inputs(name), points=points, gradients=loss)
    for port in PORTS:
        grad = cache.gradients[f"{path}:{port}"]
        wanted = caught[port]
        if port in ("scores", "pattern"):
            wanted = wanted.reshape(grad.shape)
        else:  # of a group of heads that share keys and values: their sum
            wanted = wanted.reshape(grad.shape[0], grad.shape[2], -1, *wanted.shape[-2:]).sum(dim=2).transpose(1, 2)
        assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-9), port


def test_the_residual_stream_adds_up(name, model):
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(**inputs(name))
    stack = "decoder." if name == "t5" else ""
    for i in range(2):
        b = f"{stack}blocks.{i}."
        pre, attn, mlp = (cache[f"{b}hook_{what}"] for what in ("resid_pre", "attn_out", "mlp_out"))
        post = cache[f"{b}hook_resid_post"]
        attn, mlp = attn.reshape(pre.shape), mlp.reshape(pre.shape)
        if f"{b}hook_resid_mid" not in cache:
            assert name in ("neox", "gptj")  # attention and MLP side by side
            assert torch.allclose(post, pre + attn + mlp, atol=1e-6)
            continue
        mid = cache[f"{b}hook_resid_mid"].reshape(pre.shape)
        cross = cache[f"{b}hook_cross_attn_out"] if name == "t5" else 0
        assert torch.equal(mid, pre + attn + cross)
        before = cache.get(f"{b}hook_normalized_resid_mid", mid)
        assert torch.equal(post, before + mlp)
    after = f"{stack}blocks.0.hook_normalized_resid_post"
    after = after if after in cache else f"{stack}blocks.0.hook_resid_post"
    assert torch.equal(cache[f"{stack}blocks.1.hook_resid_pre"], cache[after])


def test_names_are_the_same_whichever_way_attention_is_computed():
    model = family("llama", "eager")
    hooks = HookManager(model)
    names = [str(p) for p in hooks.points("*hook_*")]
    _, eager = hooks.run_with_cache(**inputs("llama"), points="*.hook_pattern")
    model.set_attn_implementation("sdpa")
    assert [str(p) for p in hooks.points("*hook_*")] == names
    _, fused = hooks.run_with_cache(**inputs("llama"), points="*.hook_pattern")
    assert torch.allclose(eager["pattern", 1], fused["pattern", 1], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_in_half_precision_the_pattern_is_what_the_model_mixes_values_with(kind):
    model = family(kind, "eager").to(torch.bfloat16)
    hooks = HookManager(model)
    wanted = model(**inputs(kind), output_attentions=True)
    output, cache = hooks.run_with_cache(**inputs(kind))
    assert torch.equal(output.logits, wanted.logits)
    assert all(torch.equal(cache["pattern", i], wanted.attentions[i]) for i in range(2))


def test_one_query_for_grouped_keys_is_shown_with_all_its_heads():
    """A fused function may be given one query's heads in the place of positions."""
    model = family("llama", "sdpa")
    hooks = HookManager(model)
    points = [f"model.layers.1.self_attn:{port}" for port in ("q", "scores", "pattern", "z")]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens, cache = hooks.generate(inputs("llama")["input_ids"], points=points, **options)
    _, whole = hooks.run_with_cache(tokens[:, :-1], points=points)
    for point in points:
        assert torch.allclose(cache[point], whole[point], atol=1e-5), point


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_that_a_model_copies_out_of_a_fused_projection_are_those_alone(groups):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    grouped = {"new_decoder_architecture": True, "num_kv_heads": groups} if groups > 1 else {}
    config = transformers.FalconConfig(**sizes, **grouped, bos_token_id=1, eos_token_id=2)
    model, tokens = transformers.FalconForCausalLM(config).eval(), torch.arange(3, 9)[None]
    fused = model.transformer.h[1].self_attention.query_key_value
    given = torch.randn(1, 6, groups, 8)

    def apart(output):
        return output.unflatten(-1, (groups, -1, 8))

    def written(module, args, output):
        new = output.clone()
        apart(new)[..., -1, :] = given
        return new

    with torch.no_grad():
        handle = fused.register_forward_hook(written)
        wanted = model(tokens).logits
        handle.remove()
        hooks = HookManager(model)
        _, cache = hooks.run_with_cache(tokens, points=["*.hook_v", "*.hook_k", fused])
        whole = apart(cache["transformer.h.1.self_attention.query_key_value:output"])
        got = hooks.run_with_hooks(tokens, hooks=[("blocks.1.attn.hook_v", lambda t, p: given.clone())]).logits
    assert torch.equal(cache["blocks.1.attn.hook_k"], whole[..., -2, :])
    assert torch.equal(cache["blocks.1.attn.hook_v"], whole[..., -1, :])
    assert torch.equal(got, wanted)
    queries = hooks.points("blocks.1.attn.hook_q")[0]
    assert queries.available == (groups == 1)
    assert groups == 1 or "read them at hook_rot_q" in queries.reason


def test_blocks_that_are_called_again_attend_in_one_way():
    config = transformers.AlbertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=50,
        embedding_size=16,
        attn_implementation="eager",
    )
    model, tokens = transformers.AlbertModel(config).eval(), torch.arange(3, 9)[None]
    hooks = HookManager(model)
    assert not [point.name for point in hooks.points("*hook_*") if "cross_attn" in point.name]
    output, cache = hooks.run_with_cache(tokens, points="*.hook_pattern", output_attentions=True)
    for call, pattern in enumerate(output.attentions):
        assert torch.equal(cache["blocks.0.attn.hook_pattern", call], pattern)
