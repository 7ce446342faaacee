"""Attention laid open in torch's own modules and in a model of one's own; neutrality and life cycle."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode

from gradwatch.errors import HookError
from gradwatch.hooks import HookManager, patch, scale, zero

from .conftest import num_torch_hooks

PORTS = ("q", "k", "v", "scores", "pattern", "z", "result")


@pytest.fixture(params=[True, False], ids=["weights", "fused"])
def call(request):
    """One attention of torch's, and a call of it, step by step or fused."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return attention, lambda: attention(x, x, x, need_weights=request.param, attn_mask=mask), x


def by_hand(attention, x, **changes):
    """Attention as one would write it down, with a function in place of each tensor that is to be changed."""

    def at(what, tensor):
        return changes.get(what, lambda t: t)(tensor)

    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    q, k, v = (at(w, functional.linear(x, weights[i], biases[i]).unflatten(-1, (4, 4))) for i, w in enumerate("qkv"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = at("scores", scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf))
    z = at("z", torch.einsum("bhqk,bkhd->bqhd", at("pattern", scores.softmax(dim=-1)), v))
    result = torch.einsum("bqhd,ohd->bqho", z, attention.out_proj.weight.unflatten(-1, (4, 4)))
    return at("result", result).sum(dim=2) + attention.out_proj.bias


@pytest.mark.parametrize("port", PORTS)
def test_a_change_in_torchs_attention_is_what_one_would_write(call, port):
    attention, run, x = call
    change = lambda t: t * torch.linspace(0.5, 1.5, t.shape[-1])  # noqa: E731
    wanted = by_hand(attention, x, **{port: change})
    hooks = HookManager(attention)
    with hooks.temporary((f":{port}", lambda t, p: change(t))) as (hook,):
        output = run()[0]
    assert hook.calls == 1
    assert torch.allclose(output, wanted, atol=1e-6)
    ours = torch.autograd.grad(output.square().sum(), list(attention.parameters()))
    theirs = torch.autograd.grad(wanted.square().sum(), list(attention.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_looking_changes_no_bit_and_leaves_nothing(call):
    attention, run, _ = call
    wanted = run()
    hooks = HookManager(attention)
    seen = {}
    for port in PORTS:
        hooks.observe(f":{port}", lambda t, p: seen.__setitem__(p.port, t.shape))
    output = run()
    assert all(torch.equal(a, b) for a, b in zip(output, wanted, strict=True) if a is not None)
    assert seen["q"] == seen["z"] == (2, 5, 4, 4)
    assert seen["scores"] == seen["pattern"] == (2, 4, 5, 5)
    assert seen["result"] == (2, 5, 4, 16)
    hooks.close()
    assert num_torch_hooks(attention) == 0
    assert _get_current_function_mode() is None


def test_a_change_in_place_acts_without_a_return(call):
    attention, run, x = call

    def halve(tensor, point):
        tensor[:, :, 1] *= 0.5

    def halved(tensor):
        return torch.cat([tensor[:, :, :1], tensor[:, :, 1:2] * 0.5, tensor[:, :, 2:]], dim=2)

    hooks = HookManager(attention)
    for port in ("q", "scores", "pattern", "z"):
        with torch.no_grad(), hooks.temporary((f":{port}", halve)):
            output = run()[0]
            wanted = by_hand(attention, x, **{port: halved})
        assert torch.allclose(output, wanted, atol=1e-6), port


def test_heads_and_positions_of_scores_and_patterns(call):
    attention, run, _ = call
    hooks = HookManager(attention)
    _, cache = hooks.run_with_cache(*[call[2]] * 3, need_weights=False, points=":pattern")
    with hooks.temporary((":pattern", zero(heads=1, positions=3))):
        run()
        seen = []
        hooks.add(":pattern", lambda t, p: seen.append(t.clone()))
        run()
    assert not seen[0][:, 1, 3].any()
    assert seen[0][:, 0].any()
    assert seen[0][:, 1, 2].any()
    assert cache[":pattern"].shape == (2, 4, 5, 5)


def test_gradients_of_scores_and_patterns(call):
    attention, run, _ = call
    hooks = HookManager(attention)
    grads = {}
    hooks.add(":pattern", lambda t, p: t * 1.0, id="stay")
    for port in ("q", "scores", "pattern", "z"):
        hooks.add(f":{port}:grad_output", lambda g, p: grads.__setitem__(p.port, g))
    run()[0].square().sum().backward()
    assert {k: tuple(v.shape) for k, v in grads.items()} == {
        "grad_at_q": (2, 5, 4, 4),
        "grad_at_scores": (2, 4, 5, 5),
        "grad_at_pattern": (2, 4, 5, 5),
        "grad_at_z": (2, 5, 4, 4),
    }
    assert torch.allclose(grads["grad_at_scores"].sum(dim=-1), torch.zeros(2, 4, 5), atol=1e-5)


class Own(nn.Module):
    """A model of nobody's library."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([OwnBlock(width, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


class OwnBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.after(x))))


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_a_model_of_ones_own_gets_names_by_a_run_or_a_probe():
    torch.manual_seed(0)
    model = Own()
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(TOKENS, points=["*.attn.hook_*", "*.hook_resid_*"])
    mid = cache["blocks.1.hook_resid_mid"]
    assert torch.equal(cache["blocks.1.hook_resid_post"], mid + model.blocks[1].down(
        functional.gelu(model.blocks[1].up(model.blocks[1].after(mid)))
    ))  # fmt: skip
    assert cache["blocks.0.attn.hook_q"].shape == (2, 5, 4, 4)
    known = HookManager(model).probe(TOKENS)
    assert "blocks.1.attn.hook_pattern" in known
    assert "hook_embed" in known


def test_a_probe_is_a_pass_that_the_users_hooks_buffers_and_random_numbers_never_see():
    torch.manual_seed(0)
    model = Own()
    model.blocks[0].up = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(5))
    model.train()
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    HookManager(model).probe(TOKENS)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.training


def test_a_pass_that_fails_breaks_no_constructor_and_is_the_reason_given():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)

    def fails(*args, **kwargs):
        raise ValueError("not today")

    model.transformer.h[1].mlp.forward = fails
    hooks = HookManager(model)
    missing = {p: p.reason for p in hooks.points("*hook_*")}
    assert "blocks.1.attn.hook_z" in missing
    assert all("not today" in reason for reason in missing.values())
    assert hooks.observe("transformer.h.0:output", lambda t, p: None).points


def test_a_call_that_raises_leaves_no_mode_behind():
    class Stop(BaseException):
        pass

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.error = None

        def forward(self, x):
            y = functional.scaled_dot_product_attention(x, x, x)
            if self.error is not None:
                raise self.error
            return y

    model, x = Failing(), torch.randn(1, 2, 3, 4)
    hooks = HookManager(model)
    seen = []
    hooks.observe(":scores", lambda t, p: seen.append(p.call))
    for error in (ValueError("no"), Stop()):
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        functional.scaled_dot_product_attention(x, x, x)  # nobody's: not shown
    model.error = None
    model(x)
    assert seen == [0, 0, 0]
    assert _get_current_function_mode() is None


def test_rows_that_may_look_at_nothing_give_no_nan():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    mask[0] = False
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    model = Masked()
    output = HookManager(model).run_with_hooks(x, mask, hooks=[(":scores", lambda t, p: t * 1.0)])
    assert torch.allclose(output, model(x, mask), atol=1e-6)
    output.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_step_of_keys_that_a_group_shares_is_shown_once():
    class Grouped(nn.Module):
        num_heads, num_key_value_groups = 4, 2

        def forward(self, q, k):
            return functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    hooks = HookManager(Grouped())
    shapes = {}
    for port in ("q", "k", "scores"):
        hooks.observe(f":{port}", lambda t, p: shapes.__setitem__(p.port, tuple(t.shape)))
    hooks.model(q, k)
    assert shapes == {"q": (1, 3, 4, 8), "k": (1, 3, 2, 8), "scores": (1, 4, 3, 3)}


def test_patching_a_pattern_from_another_run(call):
    attention, run, x = call
    hooks = HookManager(attention)
    _, cache = hooks.run_with_cache(x, x, x, need_weights=False, points=":pattern")
    other = torch.randn_like(x)
    patched = hooks.run_with_hooks(other, other, other, need_weights=False, hooks=[(":pattern", patch(cache))])[0]
    wanted = by_hand(attention, other, pattern=lambda t: cache[":pattern"])
    assert torch.allclose(patched, wanted, atol=1e-6)
    with hooks.temporary((":z", scale(0.0))):
        assert torch.allclose(run()[0], attention.out_proj.bias.expand(2, 5, 16))


def test_the_largest_score_of_each_head_is_told_without_the_scores(call):
    attention, run, _ = call
    hooks = HookManager(attention)
    seen, scores = [], []
    hooks.observe(":peak", lambda t, p: seen.append(t.clone()))
    wanted = run()[0]
    hooks.observe(":scores", lambda t, p: scores.append(t.clone()))
    assert torch.equal(run()[0], wanted)
    assert torch.equal(seen[0], scores[0].amax(dim=(-2, -1)))
    assert seen[0].shape == (2, 4)
    hooks.add(":peak", lambda t, p: t * 2)
    with pytest.raises(HookError, match="can be read only"):
        run()


def test_the_largest_score_of_many_queries_is_found_part_by_part():
    class Long(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 2, 600, 4)
    hooks, seen = HookManager(Long()), {}
    for port in ("peak", "scores"):
        hooks.observe(f":{port}", lambda t, p: seen.__setitem__(p.port, t.clone()))
    hooks.model(x)
    assert torch.allclose(seen["peak"], seen["scores"].amax(dim=(-2, -1)), atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("port", ["k", "scores", "pattern", "z", "result"])
def test_changes_under_activation_checkpointing_give_the_gradients_of_the_unchecked_run(port, reentrant):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)

    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention = nn.Linear(16, 16), attention
            self.checkpoint = False

        def inner(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

        def forward(self, x):
            x = self.first(x)
            if self.checkpoint:
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)
            return self.inner(x)

    model, x = Checked(), torch.randn(2, 5, 16)
    grads = []
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        hooks = HookManager(model)
        output = hooks.run_with_hooks(x, hooks=[(f"attention:{port}", lambda t, p: t * 0.5)])
        output.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert num_torch_hooks(model) == 0


def test_stacks_that_no_inputs_can_be_made_up_for_break_nothing():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    empty = nn.TransformerEncoder(layer, 0, enable_nested_tensor=False)
    own = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    own.layers = nn.ModuleList([nn.Linear(8, 8)])
    for model in (empty, own, nn.Sequential(empty, nn.Linear(8, 8))):
        hooks = HookManager(model)
        assert not [p for p in hooks.points("*") if "hook_" in p and p.available]
        assert hooks.observe("*:output", lambda t, p: None).points


def test_masked_scores_may_be_multiplied_by_zero_and_a_point_knows_its_aliases():
    class Causal(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 2, 3, 4)
    output = HookManager(Causal()).run_with_hooks(x, hooks=[(":scores", lambda t, p: t * 0)])
    assert torch.allclose(output, x.mean(dim=2, keepdim=True).expand_as(x), atol=1e-6)
    hooks = HookManager(Own())
    hooks.probe(TOKENS)
    (point,) = hooks.points("blocks.0.attn.hook_pattern")
    assert point.aliases == ("blocks.0.attn.hook_pattern",)
