"""Attention in forms that few models have: stages of blocks, positions first, complex rotations, sinks, odd inputs."""

import pytest
import torch
from torch import nn

from gradwatch.hooks import HookManager, zero

transformers = pytest.importorskip("transformers")

from ._families import GROUPED, SPECIAL, USUAL, by_hand  # noqa: E402

HEADS, WIDTH = 2, 8
STATES = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
PARTS = ("q", "k", "v", "attn_scores", "pattern", "z", "result")


class Attention(nn.Module):
    """Attends with the batch first, or with positions first; turns queries and keys by complex numbers if asked to."""

    def __init__(self, *, positions_first=False, turns=False):
        super().__init__()
        self.num_heads, self.positions_first, self.turns = HEADS, positions_first, turns
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        batch, positions = (x.shape[1], x.shape[0]) if self.positions_first else x.shape[:2]
        q, k, v = (self.apart(p(x), batch, positions) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.turns:
            angles = torch.outer(torch.arange(positions).float(), torch.tensor([1.0, 0.5]))
            by = torch.polar(torch.ones_like(angles), angles)
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * by).flatten(-2) for t in (q, k)
            )
        pattern = (torch.bmm(q, k.transpose(1, 2)) / 2).softmax(dim=-1)
        z = torch.bmm(pattern, v)
        if self.positions_first:
            return self.out(z.transpose(0, 1).reshape(positions, batch, WIDTH))
        return self.out(z.unflatten(0, (batch, HEADS)).transpose(1, 2).reshape(batch, positions, WIDTH))

    def apart(self, t, batch, positions):
        if self.positions_first:
            return t.reshape(positions, batch * HEADS, -1).transpose(0, 1)
        return t.unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, **form):
        super().__init__()
        self.attn, self.mlp = Attention(**form), nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Blocks(nn.Module):
    def __init__(self, depth=2, **form):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(**form) for _ in range(depth)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Blocks(1), Blocks(2)])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def probed(model, *args, **kwargs):
    hooks = HookManager(model.eval())
    hooks.probe(*args, **kwargs)
    return hooks


def test_blocks_in_stages_each_have_their_names():
    model = Stages()
    hooks = probed(model, STATES)
    names = [p.name for p in hooks.points("*") if p.name.endswith("hook_pattern")]
    assert names == [f"stages.{i}.blocks.{j}.attn.hook_pattern" for i, j in ((0, 0), (1, 0), (1, 1))]
    assert not [p for p in hooks.points("*") if "cross_attn" in p.name]
    _, cache = hooks.run_with_cache(STATES)
    for name, block in (
        ("stages.0.blocks.0", model.stages[0].blocks[0]),
        ("stages.1.blocks.1", model.stages[1].blocks[1]),
    ):
        pre, mid = cache[f"{name}.hook_resid_pre"], cache[f"{name}.hook_resid_mid"]
        assert torch.equal(mid, pre + block.attn(pre))
        assert torch.equal(cache[f"{name}.hook_resid_post"], mid + block.mlp(mid))


def test_positions_first_is_shown_with_the_batch_first_as_all_else():
    first, last = Blocks(), Blocks(positions_first=True)
    last.load_state_dict(first.state_dict())
    usual, turned = probed(first, STATES), probed(last, STATES.transpose(0, 1))
    _, wanted = usual.run_with_cache(STATES)
    _, cache = turned.run_with_cache(STATES.transpose(0, 1))
    for part in PARTS:
        name = f"blocks.1.attn.hook_{part}"
        assert cache[name].shape == wanted[name].shape
        assert torch.allclose(cache[name], wanted[name], atol=1e-6), part
        specs = [(name, zero(heads=1))]
        changed = turned.run_with_hooks(STATES.transpose(0, 1), hooks=specs).transpose(0, 1)
        assert torch.allclose(changed, usual.run_with_hooks(STATES, hooks=specs), atol=1e-6), part


def test_a_rotation_by_complex_numbers_is_one():
    hooks = probed(Blocks(turns=True), STATES)
    _, cache = hooks.run_with_cache(STATES)
    for letter in "qk":
        still, turned = (cache[f"blocks.0.attn.hook_{name}"] for name in (letter, f"rot_{letter}"))
        assert torch.equal(
            still, hooks.model.blocks[0].attn.get_submodule(f"{letter}_proj")(STATES).unflatten(-1, (2, 4))
        )
        assert torch.equal(turned[:, 0], still[:, 0])
        assert not torch.allclose(turned[:, 1], still[:, 1])


MLA = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
RANKS = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
TOKENS = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])


def test_keys_of_which_a_part_is_rotated_are_rotated_keys():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**USUAL, **MLA, **RANKS, v_head_dim=8, attn_implementation="eager")
    hooks = HookManager(transformers.DeepseekV3ForCausalLM(config).eval())
    with by_hand() as hand:
        hooks.model(TOKENS)
    _, cache = hooks.run_with_cache(TOKENS)
    for part, name in (("q", "rot_q"), ("k", "rot_k"), ("v", "v"), ("z", "z"), ("pattern", "pattern")):
        seen = hand.seen[1][part]
        wanted = seen if part == "pattern" else seen.transpose(1, 2)
        assert torch.equal(cache[f"blocks.1.attn.hook_{name}"], wanted), part
    assert cache["blocks.1.attn.hook_q"].shape == (2, 6, 4, 8)
    assert "takes its projection apart" in next(p for p in hooks.points("*") if p == "blocks.1.attn.hook_k").reason


def test_a_sink_is_no_key():
    torch.manual_seed(0)
    experts = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**GROUPED, **experts, attn_implementation="eager")
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if not parameter.isfinite().all() else None
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(TOKENS)
    attentions = model(TOKENS, output_attentions=True).attentions
    place = "blocks.1.attn.hook"
    pattern, values = cache[f"{place}_pattern"], cache[f"{place}_v"].repeat_interleave(2, dim=2)
    assert torch.equal(pattern, attentions[1])
    assert cache[f"{place}_attn_scores"].shape == pattern.shape
    assert bool((pattern.sum(dim=-1) < 1).all())  # the rest is the sink's
    assert torch.allclose(cache[f"{place}_z"], torch.einsum("bhqk,bkhd->bqhd", pattern, values), atol=1e-6)
    halved = hooks.run_with_hooks(TOKENS, hooks=[(f"{place}_pattern", lambda t, p: t * 0.5)])
    by_values = hooks.run_with_hooks(TOKENS, hooks=[(f"{place}_v", lambda t, p: t * 0.5)])
    assert torch.equal(halved.logits, by_values.logits)
    same = hooks.run_with_hooks(TOKENS, hooks=[(f"{place}_attn_scores", lambda t, p: t * 1.0)])
    assert torch.equal(same.logits, model(TOKENS).logits)


PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPOKEN = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 50}


def two_towers():
    text = {**USUAL, "eos_token_id": 7}
    pictures = {**PICTURE, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=pictures, projection_dim=16))


def spoken():
    sizes = {**SPOKEN, "decoder_attention_heads": 4, "max_source_positions": 10, "num_mel_bins": 8}
    ids = {**SPECIAL, "decoder_start_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **ids))


@pytest.mark.parametrize(
    ("make", "num_patterns", "first"),
    [
        pytest.param(two_towers, 4, "vision_model.encoder.blocks.0.attn.hook_pattern", id="text-and-pictures"),
        pytest.param(spoken, 6, "encoder.blocks.0.attn.hook_pattern", id="sound-to-text"),
    ],
)
def test_inputs_are_made_up_for_all_that_a_forward_needs(make, num_patterns, first):
    names = [p.name for p in HookManager(make().eval()).points("*") if p.name.endswith("attn.hook_pattern")]
    assert len(names) == num_patterns
    assert first in names


class Demanding(nn.Module):
    """Looks like one of Hugging Face's, and needs more than can be made up."""

    main_input_name = "input_ids"
    dummy_inputs = None
    config = None

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(50, WIDTH), Blocks()

    def forward(self, input_ids, weights):
        return self.inner(self.embed(input_ids) * weights[..., None])


def test_where_inputs_that_were_made_up_are_no_good_those_of_the_run_are_taken():
    hooks = HookManager(Demanding().eval())
    name = "blocks.1.attn.hook_pattern"
    refused = [p for p in hooks.points("*") if "hook_" in p]
    assert refused
    assert not any(p.available for p in refused)
    given = TOKENS, torch.rand(TOKENS.shape)
    _, cache = hooks.run_with_cache(*given, points=name)
    assert cache[name].shape == (2, HEADS, 6, 6)
    assert "blocks.0.hook_resid_post" in HookManager(Demanding().eval()).run_with_cache(*given)[1]


EQUATIONS = {
    "heads-before-positions": ("b h i d, b h j d -> b h i j", "b h i j, b h j d -> b h i d", "bhpd"),
    "positions-before-heads": ("bihd,bjhd->bhij", "bhij,bjhd->bihd", "bphd"),
    "positions-before-the-batch": ("ibhd,jbhd->bhij", "bhij,jbhd->ibhd", "pbhd"),
    "heads-in-the-batch": ("nid,njd->nij", "nij,njd->nid", "npd"),
}


class ByEquations(nn.Module):
    """The same attention, written as equations over letters."""

    def __init__(self, equations):
        super().__init__()
        self.num_heads, (self.scores, self.mixed, self.order) = HEADS, equations
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (self.held(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        pattern = (torch.einsum(self.scores, q, k) / 2).softmax(dim=-1)
        z = torch.einsum(self.mixed, pattern, v)
        if self.order == "npd":
            z, order = z.unflatten(0, (-1, HEADS)), "bhpd"
        else:
            order = self.order
        return self.out(z.permute([order.index(c) for c in "bphd"]).flatten(-2))

    def held(self, t):
        t = t.unflatten(-1, (HEADS, -1))
        if self.order == "npd":
            return t.transpose(1, 2).flatten(0, 1)
        return t.permute(["bphd".index(c) for c in self.order])


@pytest.mark.parametrize("equations", [pytest.param(e, id=name) for name, e in EQUATIONS.items()])
def test_attention_written_as_equations_is_attention(equations):
    plain, written = Blocks(), Blocks()
    for block in written.blocks:
        block.attn = ByEquations(equations)
    written.load_state_dict(plain.state_dict())
    usual, hooks = probed(plain, STATES), probed(written, STATES)
    untouched = written(STATES)
    _, wanted = usual.run_with_cache(STATES, gradients=lambda out: out.square().sum())
    output, cache = hooks.run_with_cache(STATES, gradients=lambda out: out.square().sum())
    assert torch.equal(output, untouched)
    for part in PARTS:
        name = f"blocks.1.attn.hook_{part}"
        assert cache[name].shape == wanted[name].shape
        assert torch.allclose(cache[name], wanted[name], atol=1e-6), part
        specs = [(name, lambda tensor, point: tensor * torch.linspace(0, 1, tensor.shape[-1]))]
        changed = hooks.run_with_hooks(STATES, hooks=specs)
        assert torch.allclose(changed, usual.run_with_hooks(STATES, hooks=specs), atol=1e-5), part
        assert not torch.allclose(changed, untouched, atol=1e-3)
    for port in ("q", "k", "v", "scores", "pattern", "z"):
        specs = [(f"blocks.1.attn:{port}", lambda tensor, point: tensor * 0.5)]
        changed, alike = (h.run_with_hooks(STATES, hooks=specs) for h in (hooks, usual))
        assert torch.allclose(changed, alike, atol=1e-6), port
        _, one = hooks.run_with_cache(STATES, points=specs[0][0], gradients=lambda out: out.square().sum())
        _, other = usual.run_with_cache(STATES, points=specs[0][0], gradients=lambda out: out.square().sum())
        assert torch.allclose(one.gradients[specs[0][0]], other.gradients[specs[0][0]], atol=1e-5), port


@pytest.mark.parametrize(
    "equation", ["bij,bjk->bik", "ij,jk->ik", "bhid,bhjd->bhji", "bhid,hjd->bhij", "...id,...jd->...ij"]
)
def test_other_equations_are_left_alone(equation):
    class Multiplies(nn.Module):
        def forward(self, x):
            shapes = {"i": 3, "j": 3, "k": 3, "b": 2, "h": 2, "d": 3}
            left, right = equation.split("->")[0].split(",")
            given = (torch.ones([shapes[c] for c in part.replace(".", "")]) for part in (left, right))
            return torch.einsum(equation, *given).softmax(dim=-1) + x.mean()

    hooks = HookManager(Multiplies())
    wanted = hooks.model(STATES)
    seen = []
    hooks.observe([(hooks.model, "q"), (hooks.model, "z")], lambda tensor, point: seen.append(point.name))
    assert torch.equal(hooks.model(STATES), wanted)
    assert ":z" not in seen
