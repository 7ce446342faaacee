"""Captures: bounded in number and bytes, safe across threads, in memory or on disk."""

import sys
import threading

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, MissingExtraError, UnknownNameError
from gradwatch.hooks import ActivationStore, HookManager

from .conftest import num_torch_hooks


def test_input_and_output_of_layer_4_with_a_limit(net, x):
    hooks = HookManager(net)
    captured = hooks.capture(4, inputs=True, outputs=True, max_states=3)
    for _ in range(5):
        net(x)
    assert (len(captured), captured.dropped) == (3, 2)
    assert [state.step for state in captured] == [2, 3, 4]
    assert [state.id for state in captured] == [2, 3, 4]
    _, cache = hooks.run_with_cache(x, points=["layer 4:input", "layer 4:output"])
    assert torch.equal(captured[-1].input, cache["blocks.4:input"])
    assert torch.equal(captured[-1].output, cache["blocks.4:output"])
    assert captured[-1].path == "blocks.4"


def test_memory_limit_counts_bytes(net, x):
    one = 2 * 5 * 8 * 4
    captured = HookManager(net).capture("blocks.?:output", memory_limit_mb=2.5 * one / 2**20)
    net(x)
    assert (len(captured), captured.dropped, captured.num_bytes) == (2, 4, 2 * one)


@pytest.mark.parametrize(
    ("points", "options", "ports"),
    [
        pytest.param("head:input", {}, {"input"}, id="port-named"),
        pytest.param("head", {}, {"output"}, id="output-by-default"),
        pytest.param("head", {"inputs": True, "outputs": False}, {"input"}, id="inputs-only"),
        pytest.param(nn.ReLU, {"inputs": True}, {"input", "output"}, id="class"),
    ],
)
def test_what_is_captured(net, x, points, options, ports):
    captured = HookManager(net).capture(points, **options)
    net(x)
    assert set(captured[0].values) == ports
    with pytest.raises(UnknownNameError):
        captured[0]["grad_output"]


def test_input_is_captured_before_the_module_changes_it_in_place(net, x):
    captured = HookManager(net).capture("blocks.0.mlp.1", inputs=True)  # ReLU(inplace=True)
    net(x)
    assert (captured[0].input < 0).any()
    assert not (captured[0].output < 0).any()


def test_device_dtype_clear_pause_and_close(net, x):
    hooks = HookManager(net)
    captured = hooks.capture("blocks.?", dtype=torch.bfloat16, device="cpu", id="cap")
    net(x)
    assert captured[0].output.dtype == torch.bfloat16
    assert len(captured.of("blocks.2")) == 1
    assert captured.clear(captured[0].id, captured[1].id) == 2
    assert captured.clear() == 4
    assert (len(captured), captured.dropped, captured.num_bytes) == (0, 0, 0)
    with hooks["cap"].disabled():
        net(x)
    assert len(captured) == 0
    captured.close()
    assert num_torch_hooks(net) == 0


def test_cleanup_interval_and_limits_must_be_above_zero(net, x):
    captured = HookManager(net).capture("head", max_states=1, cleanup_interval=2)
    for _ in range(5):
        net(x)
    assert captured.dropped == 4
    for name in ("max_states", "memory_limit_mb", "cleanup_interval"):
        with pytest.raises(ConfigError, match=f"`{name}` is above 0"):
            HookManager(net).capture("head", **{name: float("nan")})
    with pytest.raises(ConfigError, match="takes inputs, outputs, gradients"):
        HookManager(net).capture("head", outputs=False)


def test_threads_capture_whole_states(net, x):
    captured = HookManager(net).capture("head", inputs=True, max_states=40)
    xs = [x * k for k in range(4)]
    gate = threading.Barrier(4)

    def work(mine):
        gate.wait()
        for _ in range(10):
            net(mine)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captured) == 40
    for state in captured:
        assert torch.equal(net.head(state.input), state.output)


def test_a_store_gets_one_file_for_each_forward_pass_and_nothing_stays_in_memory(net, x, tmp_path):
    hooks = HookManager(net)
    captured = hooks.capture("blocks.?", inputs=True, store=tmp_path / "store")
    for k in range(3):
        net(x * k)
    assert len(captured) == 0
    hooks.close()  # writes the last pass
    store = ActivationStore(tmp_path / "store")
    assert len(store) == 3
    assert sorted(p.name for p in (tmp_path / "store").glob("*.safetensors"))[-1] == "batch-000002.safetensors"
    assert "blocks.3:input" in store.names
    assert [store.metadata(i)["step"] for i in range(3)] == [0, 1, 2]
    _, cache = HookManager(net).run_with_cache(x * 2)
    assert torch.equal(store[2]["blocks.4:output"], cache["blocks.4:output"])
    assert store.load("blocks.4:output").shape == (6, 5, 8)


def test_a_store_is_continued_read_lazily_and_survives_a_torn_index(tmp_path):
    store = ActivationStore(tmp_path)
    store.append({"a": torch.ones(2)}, step=0)
    first = (tmp_path / "batch-000000.safetensors").stat().st_mtime_ns
    with (tmp_path / "index.jsonl").open("a") as index:
        index.write('{"file": "batch-0000')  # a crash while writing
    again = ActivationStore(tmp_path)
    again.append({"a": torch.ones(2) * 2, "b": torch.zeros(1, dtype=torch.bfloat16)}, step=1)
    assert (tmp_path / "batch-000000.safetensors").stat().st_mtime_ns == first
    assert [float(t[0]) for t in ActivationStore(tmp_path).iterate("a")] == [1.0, 2.0]
    assert again[1]["b"].dtype == torch.bfloat16
    assert [dict(batch.metadata) for batch in again] == [{"step": 0}, {"step": 1}]
    (tmp_path / "batch-000000.safetensors").unlink()
    assert len(ActivationStore(tmp_path)) == 2  # nothing is opened before it is asked for
    with pytest.raises(UnknownNameError, match="there is no tensor 'c'"):
        again.iterate("c")
    with pytest.raises(KeyError):
        again[0]["b"]


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradwatch\[hooks\]'"):
        ActivationStore(tmp_path)
