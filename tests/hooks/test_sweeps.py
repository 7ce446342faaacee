"""Sweeps over heads and positions together, attributions in two passes, several metrics, batches, any inputs."""

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.hooks import HookManager, patch, zero

transformers = pytest.importorskip("transformers")

from ._families import family  # noqa: E402

CLEAN = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])
OTHER = torch.tensor([[3, 8, 4, 9, 7, 6], [11, 9, 13, 4, 8, 10]])
Z = "*.attn.hook_z"


def metric(output):
    logits = output.logits if hasattr(output, "logits") else output
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


@pytest.fixture(scope="module")
def hooks():
    return HookManager(family("llama", "eager"))


@pytest.fixture(scope="module")
def cache(hooks):
    return hooks.run_with_cache(CLEAN)[1]


def by_hand(hooks, cache, name, position, head, origin=None):
    """One patch, written out."""
    origin = position if origin is None else origin
    value = cache[name]

    def hook(tensor, point):
        tensor = tensor.clone()
        tensor[:, position, head] = value[:, origin, head]
        return tensor

    with torch.no_grad():
        return float(metric(hooks.run_with_hooks(OTHER, hooks=[(name, hook)])))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_heads_and_positions_together_are_a_loop_over_both(hooks, cache, batch_size):
    found = hooks.sweep(
        Z, [1, 3, 5], metric, heads=range(4), inputs=OTHER, source=cache, batch_size=batch_size, progress=False
    )
    assert found.values.shape == (2, 4, 3)
    assert found.heads == (0, 1, 2, 3)
    assert found.places == (1, 3, 5)
    for layer in range(2):
        for head in (0, 3):
            for column, position in enumerate((1, 3, 5)):
                wanted = by_hand(hooks, cache, f"blocks.{layer}.attn.hook_z", position, head)
                value = found.values[layer, head, column]
                assert value == (wanted if batch_size == 1 else pytest.approx(wanted, abs=1e-6))


def test_a_position_may_be_filled_from_another(hooks, cache):
    name = "blocks.1.attn.hook_z"
    found = hooks.sweep(
        name, [2, 3], metric, heads=[1], source_positions=[0, 5], inputs=OTHER, source=cache, progress=False
    )
    assert found.values[0, 0, 0] == by_hand(hooks, cache, name, 2, 1, origin=0)
    assert found.values[0, 0, 1] == by_hand(hooks, cache, name, 3, 1, origin=5)
    same = hooks.sweep(
        name, [2], metric, heads=[1], source_positions={2: 0}, inputs=OTHER, source=cache, progress=False
    )
    assert same.values[0, 0, 0] == found.values[0, 0, 0]
    changed = hooks.run_with_cache(
        OTHER, points=name, hooks=[(name, patch(cache, positions=[2, 3], source_positions=[0, 5]))]
    )[1]
    assert torch.equal(changed[name][:, [2, 3]], cache[name][:, [0, 5]])


def test_several_metrics_and_vectors_keep_their_shapes(hooks, cache):
    both = hooks.sweep(
        "*.hook_resid_pre",
        [0, 5],
        {"difference": metric, "top": lambda out: out.logits[0, -1].topk(3).values},
        inputs=OTHER,
        source=cache,
        progress=False,
    )
    assert both.metrics["difference"].shape == (2, 2)
    assert both.metrics["top"].shape == (2, 2, 3)
    assert both.values is both.metrics["difference"]
    assert both.baselines["top"].shape == (3,)
    one = hooks.sweep("*.hook_resid_pre", [0, 5], metric, inputs=OTHER, source=cache, progress=False)
    assert np.array_equal(one.values, both.values)
    vector = hooks.sweep("*.hook_resid_pre", [5], lambda out: out.logits[0, -1, :4], inputs=OTHER, source=cache,
                         progress=False)  # fmt: skip
    clean = hooks.model(CLEAN).logits[0, -1, :4].detach().double().numpy()
    assert vector.normalised(clean).shape == (2, 1, 4)


def test_inputs_are_whatever_the_model_takes(hooks, cache):
    mask = torch.ones_like(OTHER)
    ways = [OTHER, (OTHER,), {"input_ids": OTHER}, {"input_ids": OTHER, "attention_mask": mask}]
    found = [hooks.sweep(Z, None, metric, heads=[0], inputs=w, source=cache, progress=False).values for w in ways]
    assert all(np.allclose(found[0], other, atol=1e-6) for other in found)
    named = hooks.sweep(
        Z, None, metric, heads=[0], inputs=OTHER, model_kwargs={"attention_mask": mask}, source=cache, progress=False
    )
    assert np.allclose(named.values, found[0], atol=1e-6)


def test_a_batched_sweep_of_a_loss_gives_nan_and_not_another_runs_number(hooks):
    given = {"input_ids": OTHER, "labels": OTHER}
    loss = lambda out: out.loss  # noqa: E731
    options = {"heads": [0, 1], "inputs": given, "intervention": zero, "progress": False}
    assert np.isfinite(hooks.sweep(Z, None, loss, **options).values).all()
    assert np.isnan(hooks.sweep(Z, None, loss, batch_size=2, **options).values).all()


def test_chance_in_training_mode_is_said_and_only_where_there_is_any():
    options = {"inputs": torch.randn(2, 5, 4), "intervention": zero, "progress": False}
    for chance in (nn.Dropout(0.1), nn.BatchNorm1d(5), nn.MultiheadAttention(4, 2, dropout=0.1)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
        model[1].chance = chance
        with pytest.warns(UserWarning, match=r"'1.chance' is in training mode: the runs of a sweep differ by chance"):
            HookManager(model).sweep("0", [0], lambda out: out.sum(), **options)
        HookManager(model.eval()).sweep("0", [0], lambda out: out.sum(), **options)
    HookManager(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))).sweep("0", [0], lambda out: out.sum(), **options)


class Smooth(nn.Module):
    """Linear in each of its parts: attribution is then exact."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_attribution_of_what_is_linear_is_the_sweep_in_two_passes():
    torch.manual_seed(0)
    model = Smooth()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    hooks = HookManager(model)
    clean, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    total = lambda out: out[..., 0].sum()  # noqa: E731
    found = hooks.attribute("first", range(5), total, inputs=other, source=clean)
    assert len(calls) == 2
    _, cache = hooks.run_with_cache(clean)
    wanted = hooks.sweep("first", range(5), total, inputs=other, source=cache, progress=False)
    assert np.allclose(found.values, wanted.values, atol=1e-5)
    assert found.baseline == pytest.approx(wanted.baseline, abs=1e-5)
    assert np.allclose(hooks.attribute("first", range(5), total, inputs=other, source=cache).values, found.values)
    ablated = hooks.sweep("first", range(5), total, inputs=other, intervention=zero, progress=False)
    assert np.allclose(hooks.attribute("first", range(5), total, inputs=other).values, ablated.values, atol=1e-5)


def test_attribution_by_head_and_position_is_gradient_times_difference(hooks, cache):
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern"]
    found = hooks.attribute(names, [2, 5], metric, heads=range(4), inputs=OTHER, source=cache)
    _, here = hooks.run_with_cache(OTHER, points=names, gradients=metric)
    z, pattern = names
    change = (cache[z] - here[z]) * here.gradients[z]
    assert found.values[0, 2, 1] - found.baseline == pytest.approx(float(change[:, 5, 2].sum()), abs=1e-6)
    change = (cache[pattern] - here[pattern]) * here.gradients[pattern]
    assert found.values[1, 3, 0] - found.baseline == pytest.approx(float(change[:, 3, 2].sum()), abs=1e-6)


def test_what_a_sweep_needs_is_said(hooks, cache):
    with pytest.raises(ConfigError, match="over `positions` or over `heads`: give one of them, or both"):
        hooks.sweep(Z, None, metric, inputs=OTHER, source=cache)
    with pytest.raises(ConfigError, match="one number, a tensor that gradients go through"):
        hooks.attribute(Z, None, lambda out: out.logits, heads=[0], inputs=OTHER, source=cache)
    with pytest.raises(ConfigError, match="a heatmap needs one number a place"):
        hooks.sweep(Z, None, lambda o: o.logits[0, 0], heads=[0], inputs=OTHER, source=cache, progress=False).plot()
