"""A meta tensor has no data: whatever reads one back raises. So no kernel below ever waits for a device."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gradwatch.stats import (
    Gradients,
    UpdateMeter,
    cosines,
    exponent_histograms,
    extent,
    global_norm,
    gradient_details,
    gramian,
    measure_gradients,
    moments,
    num_beyond,
    num_nonfinite,
    row_spread,
    second_look,
    tensor_norms,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, device="meta", dtype=dtype)


def mixed() -> list[torch.Tensor]:
    return [meta(3, 4, dtype=d) for d in DTYPES] + [meta(0), meta(100_000), meta(64, 32).T]


def collection() -> Gradients:
    named = [(str(i), nn.Parameter(meta(3, 4))) for i in range(3)]
    for _, p in named:
        p.grad = meta(3, 4)
    return Gradients.collect(named, grad_scale=meta())


def measured_update(limit: int = 1 << 20) -> object:
    meter = UpdateMeter(mixed() if limit >= 1 << 20 else [meta(300, 40), meta(500)], limit)
    meter.before()
    return meter.after()


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(lambda: tensor_norms(mixed()), id="tensor_norms"),
        pytest.param(lambda: global_norm(tensor_norms(mixed())), id="global_norm"),
        pytest.param(lambda: second_look(mixed()), id="second_look"),
        pytest.param(lambda: gradient_details(mixed()), id="gradient_details"),
        pytest.param(lambda: exponent_histograms(mixed()), id="exponent_histograms"),
        pytest.param(lambda: measure_gradients(mixed(), histograms=True), id="measure_gradients"),
        pytest.param(lambda: [moments(t.reshape(-1)) for t in mixed()], id="moments"),
        pytest.param(lambda: [extent(t.reshape(-1)) for t in mixed()], id="extent"),
        pytest.param(lambda: num_nonfinite(meta(5)), id="num_nonfinite"),
        pytest.param(lambda: num_beyond(meta(5), 5.0), id="num_beyond"),
        pytest.param(lambda: gramian([mixed(), mixed()]), id="gramian"),
        pytest.param(lambda: cosines(meta(3, 3)), id="cosines"),
        pytest.param(lambda: row_spread(mixed()), id="row_spread"),
        pytest.param(measured_update, id="UpdateMeter"),
        pytest.param(lambda: measured_update(8000), id="UpdateMeter-of-samples"),
        pytest.param(lambda: collection().norms, id="Gradients.norms"),
        pytest.param(lambda: collection().global_norm, id="Gradients.global_norm"),
        pytest.param(lambda: collection().mul_(meta()), id="Gradients.mul_"),
        pytest.param(lambda: collection().mul_(meta(3)), id="Gradients.mul_-each"),
        pytest.param(lambda: collection().select("1").mul_(0.5).norms, id="Gradients.select"),
        pytest.param(lambda: collection().measure(histograms=True), id="Gradients.measure"),
        pytest.param(lambda: collection().drop_([1]), id="Gradients.drop_"),
    ],
)
def test_kernel_reads_nothing_back_to_the_host(kernel) -> None:
    found = kernel()
    values = vars(found).values() if hasattr(found, "__dict__") else tree_leaves(found)
    assert all(value.is_meta for value in values if isinstance(value, torch.Tensor))


def test_meta_tensors_do_catch_a_host_read() -> None:
    with pytest.raises(RuntimeError):
        tensor_norms(mixed()).max().item()
