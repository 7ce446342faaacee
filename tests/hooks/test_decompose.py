"""The residual stream taken apart: parts add up, through the final norm, to the model's own logits."""

import pytest
import torch

from gradwatch.errors import ConfigError
from gradwatch.hooks import HookManager

transformers = pytest.importorskip("transformers")

from ._families import FAMILIES, GROUPED, USUAL, family, inputs  # noqa: E402

DECODERS = ("gpt2", "llama", "qwen3", "gemma2", "neox", "bloom", "mixtral")
LIGHT = ("gpt2", "llama")
CASES = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]


@pytest.fixture(params=CASES)
def run(request):
    model = family(request.param, "eager")
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases that are neither 1 nor 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    output, cache = HookManager(model).run_with_cache(**inputs(request.param))
    return request.param, model, output, cache


def test_parts_add_up_to_the_stream_at_every_layer(run):
    _, _, _, cache = run
    for layer in (0, 1):
        assert torch.allclose(cache.decompose_resid(layer).sum(dim=0), cache["resid_pre", layer], atol=1e-4)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert torch.allclose(parts.sum(dim=0), cache["resid_post", 1], atol=1e-4)
    assert labels[-4:] == ["0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert cache.decompose_resid(mode="attn").shape[0] == 2
    if "blocks.1.hook_resid_mid" in cache:
        assert torch.allclose(cache.decompose_resid(1, mlp_input=True).sum(dim=0), cache["resid_mid", 1], atol=1e-4)


def test_the_norm_of_the_parts_adds_up_to_the_norm(run):
    _, model, _, cache = run
    hooks = HookManager(model)
    for layer, name in ((None, "ln_final.hook_normalized"), (1, "blocks.1.ln1.hook_normalized")):
        norm = hooks.points(name)[0].module
        bias = getattr(norm, "bias", None)
        found = cache.apply_ln_to_stack(cache.decompose_resid(layer), layer).sum(dim=0)
        assert torch.allclose(found + (0 if bias is None else bias), cache[name], atol=1e-4)


def test_attributions_of_the_parts_add_up_to_the_difference_of_two_logits(run):
    name, model, output, cache = run
    parts = cache.decompose_resid()
    found = cache.logit_attrs(parts, 3, 4).sum(dim=0)
    norm, head = HookManager(model).points("ln_final.hook_normalized")[0].module, model.get_output_embeddings()
    direction = head.weight[3] - head.weight[4]
    constant = torch.zeros(())
    if getattr(norm, "bias", None) is not None:
        constant = constant + norm.bias @ direction
    if getattr(head, "bias", None) is not None:
        constant = constant + head.bias[3] - head.bias[4]
    logits = output.logits
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    assert torch.allclose(found + constant, logits[..., 3] - logits[..., 4], atol=1e-3), name
    rows = cache.logit_attrs(parts, [3, 5], [4, 6])
    assert torch.allclose(rows[:, 0], cache.logit_attrs(parts, 3, 4)[:, 0])
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=slice(-1, None)), 3, 4, pos_slice=slice(-1, None))
    assert torch.allclose(last, cache.logit_attrs(parts, 3, 4)[..., -1:], atol=1e-6)


def test_heads_are_what_attention_adds_less_its_bias(run):
    name, model, _, cache = run
    heads, labels = cache.stack_head_results(1, return_labels=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3"]
    point = HookManager(model).points("blocks.0.attn.hook_result")[0]
    bias = getattr(point.module, "bias", None)
    out = cache[f"{point.path}:output"]
    assert torch.allclose(heads.sum(dim=0) + (0 if bias is None else bias), out, atol=1e-4)
    _, fewer = HookManager(model).run_with_cache(
        **inputs(name), points=["*.hook_resid_*", "*.hook_z", f"{point.path}:output"]
    )
    assert torch.allclose(fewer.stack_head_results(1), heads, atol=1e-6)
    rest = cache.stack_head_results(incl_remainder=True)
    assert torch.allclose(rest.sum(dim=0), cache["resid_post", 1], atol=1e-4)


def test_states_of_the_stream_are_stacked(run):
    _, _, _, cache = run
    states, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert torch.equal(states[1], cache["resid_pre", 1])
    assert torch.equal(states[2], cache["resid_post", 1])


def test_a_model_without_names_says_so():
    _, cache = HookManager(torch.nn.Linear(2, 2)).run_with_cache(torch.randn(3, 2))
    with pytest.raises(ConfigError, match="no research names of blocks"):
        cache.decompose_resid()
    assert set(DECODERS) <= set(FAMILIES)


HYBRID = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
ODD = {
    "a-scale-on-logits": ("CohereForCausalLM", "CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "a-gain-that-counts-from-1": ("NemotronForCausalLM", "NemotronConfig", GROUPED),
    "blocks-that-do-not-attend": ("JambaForCausalLM", "JambaConfig", {**GROUPED, **HYBRID, "mamba_dt_rank": 4}),
}
TOKENS = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])


def made(model, config, sizes):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes, attn_implementation="eager")).eval()


@pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in ODD.items()])
def test_shares_add_up_to_the_logits_whatever_the_model_does_to_them(form):
    model = made(*form)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)
    output, cache = HookManager(model).run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(return_labels=True)
    last = max(int(label.split("_")[0]) for label in labels if label.endswith("mlp_out"))
    assert torch.allclose(parts.sum(dim=0), cache["resid_post", last], atol=1e-5)
    norm = HookManager(model).points("ln_final.hook_normalized")[0].module
    bias = getattr(norm, "bias", None)
    constant = 0 if bias is None else bias @ (model.lm_head.weight[3] - model.lm_head.weight[4])
    wanted = (output.logits[..., 3] - output.logits[..., 4]).detach()
    assert float(wanted.abs().max()) > 0.05
    assert torch.allclose(cache.logit_attrs(parts, 3, 4).sum(dim=0) + constant, wanted, atol=1e-4)


def test_what_stands_between_blocks_that_attend_is_a_part_of_its_own():
    _, cache = HookManager(made(*ODD["blocks-that-do-not-attend"])).run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["1_pre", "1_attn_out", "1_mlp_out", "2_to_3_pre", "3_attn_out", "3_mlp_out"]
    assert torch.equal(parts[3], cache["resid_pre", 3] - cache["resid_post", 1])
    assert torch.allclose(cache.decompose_resid(3).sum(dim=0), cache["resid_pre", 3], atol=1e-5)
    assert cache.accumulated_resid(3, return_labels=True)[1] == ["1_pre", "3_pre"]


def test_parts_that_do_not_add_up_are_no_parts():
    _, cache = HookManager(family("bert")).run_with_cache(**inputs("bert"))
    with pytest.raises(ConfigError, match=r"do not add up to 'blocks\.0\.hook_resid_post': the model changes"):
        cache.decompose_resid()


def test_a_projection_that_makes_no_logits_is_no_unembedding():
    sizes = {**USUAL, "cls_token_id": 1, "sep_token_id": 2}
    model = made("ModernBertForMaskedLM", "ModernBertConfig", sizes)
    _, cache = HookManager(model).run_with_cache(TOKENS)
    with pytest.raises(ConfigError, match="no projection of the final norm's output makes logits"):
        cache.logit_attrs(cache.decompose_resid(), 3, 4)


def test_of_several_stacks_one_is_to_be_named():
    _, cache = HookManager(family("t5")).run_with_cache(**inputs("t5"))
    with pytest.raises(ConfigError, match=r"Its stacks: prefix='decoder\.' or prefix='encoder\.'"):
        cache.decompose_resid()
    assert cache.accumulated_resid(prefix="decoder.").shape[0] == 3


def test_before_the_first_block_there_are_no_heads():
    _, cache = HookManager(family("llama")).run_with_cache(**inputs("llama"))
    with pytest.raises(ConfigError, match="no block stands before layer 0: there are no heads"):
        cache.stack_head_results(0)
    rest, labels = cache.stack_head_results(0, incl_remainder=True, return_labels=True)
    assert labels == ["remainder"]
    assert torch.equal(rest[0], cache["resid_pre", 0])


def test_a_part_that_a_block_does_not_add_by_itself_is_listed_with_the_reason():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = made("FalconForCausalLM", "FalconConfig", sizes)
    found = {p.name: p.reason for p in HookManager(model).points("blocks.0.*hook_*")}
    for name in ("hook_attn_out", "hook_resid_mid"):
        assert "adds no such part to its stream by itself" in found[f"blocks.0.{name}"]
