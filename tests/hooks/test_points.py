"""What a user points at is found, or there is an error that helps."""

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, UnavailablePointError, UnknownNameError, UnknownPathError
from gradwatch.hooks import Alias, HookManager, Unavailable

from .conftest import Net


def names(points):
    return [str(point) for point in points]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("blocks.0.attn:output", ["blocks.0.attn:output"], id="exact"),
        pytest.param("blocks.?.attn:input", [f"blocks.{i}.attn:input" for i in range(6)], id="glob"),
        pytest.param("*.mlp", [f"blocks.{i}.mlp:output" for i in range(6)], id="no-port-means-output"),
        pytest.param("re:blocks\\.[01]\\.attn", ["blocks.0.attn:output", "blocks.1.attn:output"], id="expression"),
        pytest.param("re:head:grad_output", ["head:grad_output"], id="expression-with-port"),
        pytest.param(4, ["blocks.4:output"], id="index"),
        pytest.param(-1, ["blocks.5:output"], id="index-from-the-end"),
        pytest.param("layer 4", ["blocks.4:output"], id="layer-4"),
        pytest.param("layer 4:grad_output", ["blocks.4:grad_output"], id="layer-4-with-port"),
        pytest.param((4, "input"), ["blocks.4:input"], id="pair"),
        pytest.param(nn.ReLU, [f"blocks.{i}.mlp.1:output" for i in range(6)], id="class"),
        pytest.param(lambda p: p.path == "head", ["head:output"], id="predicate"),
        pytest.param(["head", "embed:input"], ["head:output", "embed:input"], id="list"),
        pytest.param("head.*:grad", ["head.weight:grad", "head.bias:grad"], id="parameters"),
        pytest.param(":output", [":output"], id="root"),
        pytest.param(["head", "head:output"], ["head:output"], id="each-once"),
    ],
)
def test_target_means_these_points(net, target, expected):
    hook = HookManager(net).add(target, lambda t, p: None)
    assert names(hook.points) == expected


def test_module_and_parameter_objects_are_targets(net):
    hooks = HookManager(net)
    assert names(hooks.add(net.head, print).points) == ["head:output"]
    assert names(hooks.add(net.head.weight, print).points) == ["head.weight:grad"]
    with pytest.raises(UnknownPathError, match="no module or parameter that matches 'Linear object'"):
        hooks.add(nn.Linear(1, 1), print)


def test_points_lists_all_ports(net):
    found = names(HookManager(net).points("head*"))
    assert found == [
        "head:input", "head:output", "head:grad_output", "head:grad_input",
        "head.weight:grad", "head.bias:grad", "head.weight:accumulated_grad", "head.bias:accumulated_grad",
    ]  # fmt: skip
    assert len(HookManager(net).points("*:output")) == len(list(net.modules()))


def test_a_pattern_that_matches_nothing_suggests():
    with pytest.raises(UnknownPathError) as caught:
        HookManager(Net(1)).add("blokcs.0:output", print)
    assert str(caught.value) == (
        "Net has no hook point that matches 'blokcs.0:output' (20 known). "
        "Did you mean 'blocks.0:output' or 'blocks:output' or 'blocks.0.mlp:output'?"
    )


def test_an_unknown_port_lists_the_ports(net):
    with pytest.raises(UnknownNameError, match=r"head:ouput: there is no port 'ouput'. Did you mean 'output'"):
        HookManager(net).add("head:ouput", print)


def test_a_parameter_port_on_a_module_suggests_its_parameters(net):
    with pytest.raises(UnknownPathError, match=r"head.weight:grad"):
        HookManager(net).add("head:grad", print)


def test_layers_are_the_one_stack_of_like_blocks():
    assert HookManager(Net(2)).layers == ["blocks.0", "blocks.1"]
    assert HookManager(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).layers == ["0", "1"]
    both = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    with pytest.raises(ConfigError, match=r"Found 2: 'encoder.layers', 'decoder.layers'"):
        _ = HookManager(both).layers
    assert HookManager(both, layers="decoder.layers").layers[1] == "decoder.layers.1"
    with pytest.raises(ConfigError, match="Found none"):
        _ = HookManager(nn.Linear(2, 2)).layers
    with pytest.raises(UnknownPathError, match="no layer that matches 'layer 7'"):
        HookManager(Net(2)).add(7, print)


def test_a_shared_module_is_one_point_with_other_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    model.forward = None
    point = HookManager(model).points("a:output")[0]
    assert point.other_names == ("b",)
    assert names(HookManager(model).points("b:output")) == ["a:output"]
    assert len(HookManager(model).add("?", print).points) == 1


def test_wrappers_names_are_optional(net):
    wrapped = nn.Module()
    wrapped.module = net
    assert names(HookManager(wrapped).points("blocks.0:output")) == ["module.blocks.0:output"]


def test_aliases_fill_placeholders_and_are_listed(net):
    hooks = HookManager(net, aliases={"blocks.{i}.hook_resid_post": "blocks.{i}:output", "logits": "head"})
    assert hooks.points("blocks.1:output")[0].aliases == ("blocks.1.hook_resid_post",)
    points = hooks.add("blocks.*.hook_resid_post", print).points
    assert names(points) == [f"blocks.{i}.hook_resid_post" for i in range(6)]
    assert [p.place for p in points] == [f"blocks.{i}:output" for i in range(6)]
    assert hooks.add("logits", print).points[0].place == "head:output"
    assert hooks.add("logits:grad_output", print).points[0].place == "head:grad_output"


def test_a_hook_under_an_alias_is_told_the_alias(net, x):
    hooks = HookManager(net, aliases={"logits": "head:output"})
    seen = []
    hooks.add("logits", lambda t, p: seen.append((p.name, p.path, p.port)))
    net(x)
    assert seen == [("logits", "head", "output")]


def test_an_alias_that_leads_nowhere_is_an_error(net):
    with pytest.raises(UnknownPathError, match=r"path for the alias 'a' that matches 'blocs.0'"):
        HookManager(net, aliases={"a": "blocs.0:output"})
    with pytest.raises(ConfigError, match="need the same placeholders"):
        HookManager(net, aliases={"a.{i}": "blocks.0:output"})
    assert "a" not in names(HookManager(net, aliases={"a": Alias("gone", optional=True)}).points("*"))


def test_an_unavailable_name_is_listed_with_its_reason(net):
    hooks = HookManager(net, aliases={"pattern.{i}": Unavailable("it has no attention", where="blocks.{i}")})
    listed = hooks.points("pattern.*")
    assert len(listed) == 6
    assert not listed[0].available
    with pytest.raises(UnavailablePointError) as caught:
        hooks.add("pattern.2", print)
    assert str(caught.value) == "hook point 'pattern.2' is not available: it has no attention."


def test_a_model_that_changes_is_looked_up_afresh(net):
    hooks = HookManager(net)
    net.extra = nn.Linear(3, 3)
    assert names(hooks.points("extra:output")) == ["extra:output"]


@pytest.mark.parametrize("bad", [True, 3.5, None])
def test_something_else_is_no_target(net, bad):
    with pytest.raises(ConfigError, match="a hook point is named by"):
        HookManager(net).add(bad, print)


def test_only_a_module_can_be_managed():
    with pytest.raises(ConfigError, match=r"takes a torch.nn.Module. Got Tensor"):
        HookManager(torch.zeros(1))
