"""Generation by token: a cache across the passes of a KV cache, and interventions at tokens by number."""

import numpy as np
import pytest
import torch

from gradwatch.errors import ConfigError, UnknownPathError
from gradwatch.hooks import HookManager, add, zero

transformers = pytest.importorskip("transformers")

from ._families import family  # noqa: E402

PROMPT = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
PADDED = torch.tensor([[0, 0, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
MASK = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 49}
NAMES = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_q", "blocks.0.hook_mlp_out"]


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return family(request.param, "eager")


def test_the_cache_of_a_generation_is_that_of_one_pass_over_all_its_tokens(model):
    hooks = HookManager(model)
    tokens, cache = hooks.generate(PROMPT, points=NAMES, **GREEDY)
    assert torch.equal(tokens, model.generate(PROMPT, **GREEDY))
    assert tokens.shape == (2, 11)
    _, whole = hooks.run_with_cache(tokens[:, :-1], points=NAMES)
    for name in NAMES:
        assert cache[name].shape == whole[name].shape
        assert torch.allclose(cache[name], whole[name], atol=1e-5), name
    assert torch.allclose(cache.token("blocks.1.hook_resid_post", 7), whole["resid_post", 1][:, 7], atol=1e-5)
    assert torch.allclose(cache.token("blocks.1.hook_resid_post", -1), whole["resid_post", 1][:, -1], atol=1e-5)
    assert torch.equal(cache.generated("blocks.1.hook_resid_post"), cache["resid_post", 1][:, 6:])
    assert (cache.prompt_length, cache.num_columns) == (6, 10)
    with pytest.raises(UnknownPathError, match="the generation has no token that matches '10'"):
        cache.token("blocks.1.hook_resid_post", 10)


def test_by_default_the_layers_outputs_are_kept(model):
    hooks = HookManager(model)
    _, cache = hooks.generate(PROMPT, **GREEDY)
    assert [cache[f"layer {i}"].shape for i in range(2)] == [(2, 10, 32)] * 2


def test_tokens_of_a_padded_row_count_from_its_first(model):
    hooks = HookManager(model)
    _, cache = hooks.generate(PADDED, attention_mask=MASK, points="blocks.1.hook_resid_post", **GREEDY)
    _, alone = hooks.generate(PADDED[:1, 2:], points="blocks.1.hook_resid_post", **GREEDY)
    assert cache.padding.tolist() == [2, 0]
    for number in range(8):
        here = cache.token("blocks.1.hook_resid_post", number)
        assert torch.allclose(here[0], alone.token("blocks.1.hook_resid_post", number)[0], atol=1e-5)
    assert torch.equal(cache.token("blocks.1.hook_resid_post", 3)[1], cache["resid_post", 1][1, 3])


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        (3, [3]),
        ([1, 7], [1, 7]),
        (np.int64(3), [3]),
        (torch.tensor([1, 7]), [1, 7]),
        ([False, True, False, True], [1, 3]),
        (torch.arange(10) > 7, [8, 9]),
        (slice(4, 8), [4, 5, 6, 7]),
        (slice(5, None), [5, 6, 7, 8, 9]),
        ("prompt", range(6)),
        ("generated", range(6, 10)),
    ],
    ids=str,
)
def test_steering_reaches_just_the_tokens_named(model, tokens, chosen):
    hooks = HookManager(model)
    direction = torch.linspace(-1, 1, 32)
    name = "blocks.0.hook_mlp_out"
    _, cache = hooks.generate(PROMPT, points=name, **GREEDY)
    touched = []

    def steer(tensor, point):
        touched.append(tensor.shape[1])
        return tensor + direction

    out, steered = hooks.generate(PROMPT, hooks=[(name, steer, tokens)], points=name, **GREEDY)
    by_hand = {"begin": 0}

    def hook(module, args, output):
        begin = by_hand["begin"]
        by_hand["begin"] += output.shape[1]
        columns = torch.arange(begin, begin + output.shape[1])
        return torch.where(torch.isin(columns, torch.tensor(list(chosen)))[None, :, None], output + direction, output)

    handle = hooks.points(name)[0].module.register_forward_hook(hook)
    wanted = model.generate(PROMPT, **GREEDY)
    handle.remove()
    assert torch.equal(out, wanted)
    first = min(chosen)
    assert torch.equal(steered[name][:, :first], cache[name][:, :first])
    assert not torch.equal(steered[name][:, first], cache[name][:, first])
    assert touched


def test_a_span_is_each_rows_own_where_rows_are_padded(model):
    hooks = HookManager(model)
    name = "blocks.0.hook_mlp_out"
    spec = [(name, add(torch.linspace(-1, 1, 32), factor=3.0), slice(2, 6))]
    together, _ = hooks.generate(PADDED, attention_mask=MASK, hooks=spec, **GREEDY)
    alone, _ = hooks.generate(PADDED[:1, 2:], hooks=spec, **GREEDY)
    assert torch.equal(together[:1, 2:], alone)


def test_patterns_and_heads_at_one_token(model):
    hooks = HookManager(model)
    name = "blocks.0.attn.hook_z"
    _, cache = hooks.generate(PROMPT, hooks=[(name, zero(heads=1), 7)], points=name, **GREEDY)
    assert not cache[name][:, 7, 1].any()
    assert cache[name][:, 7, 0].all()
    assert cache[name][:, 6, 1].all()
    pattern = "blocks.1.attn.hook_pattern"
    _, cache = hooks.generate(PROMPT, hooks=[(pattern, lambda t, p: t * 0, 8)], points=pattern, **GREEDY)
    assert not cache[pattern][:, :, 8].any()
    assert cache[pattern][:, :, 7].any()
    assert cache.token(pattern, 7).shape == (2, 4, 10)


def test_without_a_kv_cache_the_numbers_of_tokens_are_the_same(model):
    hooks = HookManager(model)
    spec = [("blocks.0.hook_mlp_out", add(torch.linspace(-1, 1, 32), factor=3.0), slice(4, 8))]
    with_cache, kept = hooks.generate(PROMPT, hooks=spec, points="layer 1", **GREEDY)
    without, again = hooks.generate(PROMPT, hooks=spec, points="layer 1", use_cache=False, **GREEDY)
    assert torch.equal(with_cache, without)
    assert torch.allclose(kept["layer 1"], again["layer 1"], atol=1e-5)


def test_what_can_not_be_is_said(model):
    hooks = HookManager(model)
    for tokens, said in (
        ("all", "tokens are numbers, a mask, a slice, 'prompt' or 'generated'"),
        (None, "tokens are numbers, a mask, a slice, 'prompt' or 'generated'"),
        (-1, "tokens count from the first"),
        (slice(-3, None), "a slice of tokens counts from the first"),
        (1.5, "`tokens` is a number, a list of numbers, a mask, or a slice"),
    ):
        with pytest.raises(ConfigError, match=said):
            hooks.generate(PROMPT, hooks=[("layer 0", zero(), tokens)], **GREEDY)
    with pytest.raises(ConfigError, match="Linear has no `generate`"):
        HookManager(torch.nn.Linear(2, 2)).generate(PROMPT)
    assert not hooks.hooks
