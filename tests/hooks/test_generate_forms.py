"""Generation in all its forms: whatever ran the passes, the cache is that of one pass over what came out."""

import pytest
import torch
from torch import nn

from gradwatch.errors import UnknownPathError
from gradwatch.hooks import HookManager, add

transformers = pytest.importorskip("transformers")

from ._families import GROUPED, SPECIAL, family  # noqa: E402

PROMPT = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
PADDED = torch.tensor([[0, 0, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
MASK = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 49}
DIRECTION = torch.linspace(-1, 1, 32)
STEER = ("blocks.0.hook_mlp_out", add(DIRECTION, factor=3.0), "generated")
STATES, PATTERN = "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"
FORMS = {
    "greedy": {},
    "without-a-cache": {"use_cache": False},
    "a-cache-of-fixed-size": {"cache_implementation": "static"},
    "a-prompt-in-pieces": {"prefill_chunk_size": 2},
    "guesses-from-the-prompt": {"prompt_lookup_num_tokens": 2},
}
BEAMS = {
    "beams": {"num_beams": 3},
    "several-returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams-without-a-cache": {"num_beams": 2, "use_cache": False},
    "beams-after-a-prompt-in-pieces": {"num_beams": 2, "prefill_chunk_size": 4},
}


@pytest.fixture
def model():
    return family("llama", "eager")


@pytest.fixture
def hooks(model):
    return HookManager(model)


def whole(hooks, tokens, mask):
    """Return the cache of one pass over all tokens but the last, numbered as `generate` numbers them."""
    new = tokens.shape[1] - mask.shape[1]
    mask = torch.cat([mask, torch.ones(tokens.shape[0], new, dtype=torch.long)], dim=1)[:, :-1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return mask.bool(), hooks.run_with_cache(tokens[:, :-1], points=[STATES, PATTERN], **given)[1]


@pytest.mark.parametrize("form", [pytest.param(f, id=n) for n, f in {**FORMS, **BEAMS}.items()])
def test_the_cache_is_that_of_one_pass_over_what_came_out(hooks, model, form):
    one_row = "prompt_lookup_num_tokens" in form
    prompt, mask = (PROMPT[:1], torch.ones(1, 6, dtype=torch.long)) if one_row else (PADDED, MASK)
    settings = {**GREEDY, "attention_mask": mask, **form}
    tokens, cache = hooks.generate(prompt, points=[STATES, PATTERN], **settings)
    assert torch.equal(tokens, model.generate(prompt, **settings))
    mask = mask.repeat_interleave(form.get("num_return_sequences", 1), dim=0)
    seen, wanted = whole(hooks, tokens, mask)
    assert cache[STATES].shape == wanted[STATES].shape
    assert torch.allclose(cache[STATES][seen], wanted[STATES][seen], atol=1e-5)
    rows = cache[PATTERN].transpose(1, 2)[seen], wanted[PATTERN].transpose(1, 2)[seen]
    assert rows[0].shape == rows[1].shape
    assert torch.allclose(*rows, atol=1e-5)
    assert cache.prompt_length == 6
    assert torch.equal(cache.generated(STATES), cache[STATES][:, 6:])
    assert torch.equal(cache.generated(PATTERN), cache[PATTERN][:, :, 6:])


@pytest.mark.parametrize("form", [pytest.param(f, id=n) for n, f in FORMS.items()])
def test_what_is_generated_is_steered_in_every_form_alike(hooks, form):
    plain, _ = hooks.generate(PROMPT[:1], **GREEDY)
    wanted, _ = hooks.generate(PROMPT[:1], hooks=[STEER], **GREEDY)
    found, _ = hooks.generate(PROMPT[:1], hooks=[STEER], **GREEDY, **form)
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted, plain)


def test_a_model_that_guesses_ahead_changes_nothing_of_what_is_kept_and_steered(hooks, model):
    drafts = family("llama", "eager")
    torch.manual_seed(1)
    nn.init.normal_(drafts.lm_head.weight)
    for spec in ([], [STEER]):
        wanted, plain = hooks.generate(PROMPT[:1], hooks=spec, points=STATES, **GREEDY)
        tokens, cache = hooks.generate(PROMPT[:1], hooks=spec, points=STATES, assistant_model=drafts, **GREEDY)
        assert torch.equal(tokens, wanted)
        assert torch.allclose(cache[STATES], plain[STATES], atol=1e-5)


def test_tokens_are_steered_on_all_beams_as_by_hand(hooks, model):
    settings = {**GREEDY, "attention_mask": MASK, "num_beams": 3}
    spec = ("blocks.0.hook_mlp_out", add(DIRECTION, factor=3.0), slice(2, 6))
    found, _ = hooks.generate(PADDED, hooks=[spec], **settings)
    padding = torch.tensor([2, 2, 2, 0, 0, 0])[:, None]
    by_hand = {"begin": 0}

    def hook(module, args, output):
        begin = by_hand["begin"]
        by_hand["begin"] += output.shape[1]
        numbers = torch.arange(begin, begin + output.shape[1]) - padding
        chosen = (numbers >= 2) & (numbers < 6)
        return torch.where(chosen[..., None], output + 3.0 * DIRECTION, output)

    handle = model.model.layers[0].mlp.register_forward_hook(hook)
    wanted = model.generate(PADDED, **settings)
    handle.remove()
    assert torch.equal(found, wanted)
    assert not torch.equal(found, model.generate(PADDED, **settings))


def test_beams_that_the_models_own_configuration_asks_for_are_beams(model):
    model.generation_config.num_beams = 3
    hooks = HookManager(model)
    tokens, cache = hooks.generate(PROMPT, points=STATES, **GREEDY)
    _, wanted = whole(hooks, tokens, torch.ones(2, 6, dtype=torch.long))
    assert torch.equal(tokens, model.generate(PROMPT, **GREEDY))
    assert torch.allclose(cache[STATES], wanted[STATES], atol=1e-5)


def test_a_beam_that_ended_early_is_not_seen_after_its_end(hooks, model):
    settings = {"do_sample": False, "max_new_tokens": 9, "num_beams": 4, "length_penalty": -4.0, "eos_token_id": 7}
    tokens, cache = hooks.generate(PROMPT, points=STATES, return_dict_in_generate=True, pad_token_id=0, **settings)
    sequences = tokens.sequences
    _, wanted = whole(hooks, sequences, torch.ones(2, 6, dtype=torch.long))
    for row in range(2):
        ends = (sequences[row, 6:] == 7).nonzero()
        end = 6 + int(ends[0]) if len(ends) else sequences.shape[1] - 1
        assert torch.allclose(cache[STATES][row, :end], wanted[STATES][row, :end], atol=1e-5)
        assert cache[STATES][row, end:].isnan().all()


def test_of_a_window_each_column_is_the_key_it_is_of():
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**GROUPED, "sliding_window": 4}, attn_implementation="eager")
    model = transformers.MistralForCausalLM(config).eval()
    hooks = HookManager(model)
    names = [PATTERN, "model.layers.1.self_attn:k", "model.layers.1.self_attn:v"]
    tokens, cache = hooks.generate(PROMPT, points=names, **GREEDY)
    _, wanted = hooks.run_with_cache(tokens[:, :-1], points=names)
    for name in names:
        assert cache[name].shape == wanted[name].shape
        assert torch.allclose(cache[name], wanted[name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_second_turn_goes_on_from_the_first_ones_cache(hooks, model):
    first = model.generate(PROMPT[:1], return_dict_in_generate=True, **GREEDY)
    prompt = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    wanted, all_of_it = hooks.generate(prompt, hooks=[STEER], points=STATES, **GREEDY)
    more = {"past_key_values": first.past_key_values}
    tokens, cache = hooks.generate(prompt, hooks=[STEER], points=STATES, **more, **GREEDY)
    assert torch.equal(tokens, wanted)
    assert (cache.first_column, cache.prompt_length, cache.num_columns) == (10, 13, 17)
    assert cache[STATES].shape[1] == 7
    for number in (10, 12, 15, -1):
        assert torch.allclose(cache.token(STATES, number), all_of_it.token(STATES, number), atol=1e-5)
    assert torch.allclose(cache.generated(STATES), all_of_it.generated(STATES), atol=1e-5)
    with pytest.raises(UnknownPathError, match="the generation has no token that matches '9'"):
        cache.token(STATES, 9)


def test_a_model_that_remembers_a_state_without_columns_counts_its_tokens_too():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **SPECIAL)).eval()
    hooks, name = HookManager(model), "backbone.layers.1:output"
    tokens, cache = hooks.generate(PROMPT, points=name, **GREEDY)
    _, wanted = hooks.run_with_cache(tokens[:, :-1], points=name)
    assert torch.allclose(cache[name], wanted[name], atol=1e-4)
    spec = (name, lambda tensor, point: tensor * 0, [3, 8])
    _, changed = hooks.generate(PROMPT, hooks=[spec], points=name, **GREEDY)
    assert [i for i in range(10) if not changed[name][:, i].any()] == [3, 8]


class Adapter(nn.Module):
    """Hands `generate` on to the model within it, whose forward is then all that is called."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.generation_config = inner, inner.config, inner.generation_config

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


def test_tokens_are_numbered_by_the_model_that_runs_the_passes(hooks, model):
    wanted, kept = hooks.generate(PROMPT, hooks=[STEER], points=STATES, **GREEDY)
    outer = HookManager(Adapter(model))
    steer = ("inner.model.layers.0.mlp:output", *STEER[1:])
    tokens, cache = outer.generate(PROMPT, hooks=[steer], points="inner.model.layers.1:output", **GREEDY)
    assert torch.equal(tokens, wanted)
    assert torch.equal(cache["inner.model.layers.1:output"], kept[STATES])
