"""`gradwatch doctor`: what is installed, what TensorBoard sees, and whether two watched steps come out right."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from .._version import __version__
from ._outcome import FINE, FOUND
from ._terminal import Grid, show, show_grid, show_json

__all__ = ["HELP", "add_arguments", "run"]

HELP = "versions, the TensorBoard plugin, devices, and a self-test of two steps"
OPTIONAL = ("transformers", "accelerate", "wandb", "mlflow-skinny", "matplotlib", "rich", "safetensors", "torchjd")
SWITCHES = ("GRADWATCH", "GRADWATCH_RULES", "GRADWATCH_NATIVE")


@dataclass(frozen=True)
class Line:
    """One thing looked at; `state` is fine, absent (an extra that is not installed) or bad."""

    name: str
    state: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document instead")


def run(options: argparse.Namespace) -> int:
    lines = [line for look in (_python, _torch, _lightning, _tensorboard, _extras, _switches) for line in look()]
    lines.append(_guarded("self-test", _self_test))
    is_bad = any(line.state == "bad" for line in lines)
    if options.json:
        show_json({"ok": not is_bad, "checks": [asdict(line) for line in lines]})
    else:
        grid = Grid(["", "", ""], flexible=2)
        for line in lines:
            style = {"bad": "critical", "absent": "dim"}.get(line.state, "")
            grid.add({"fine": "ok", "absent": "-", "bad": "BAD"}[line.state], line.name, line.detail, style=style)
        show_grid(grid)
        show("something is wrong: see BAD above" if is_bad else "all is well", "critical" if is_bad else "fine")
    return FOUND if is_bad else FINE


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _guarded(name: str, check: Callable[[], str]) -> Line:
    try:
        return Line(name, "fine", check())
    except Exception as error:  # whatever it is, it is what the doctor was called for
        return Line(name, "bad", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _python() -> list[Line]:
    place = str(Path(__file__).resolve().parents[1])
    return [
        Line("gradwatch", "fine", f"{__version__}, {place}"),
        Line("python", "fine", f"{platform.python_version()}, {platform.platform()}"),
        Line("numpy", "fine", _version("numpy") or "?"),
    ]


def _torch() -> list[Line]:
    def devices() -> str:
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names) or "none"

    def version() -> str:
        import torch

        return torch.__version__

    return [_guarded("torch", version), _guarded("CUDA devices", devices), _kernels()]


def _kernels() -> Line:
    """What measures tensors: an accelerator that can't be had is no fault, one that computes wrong numbers is."""
    try:
        import torch

        from ..stats import kernel_backends, kernel_faults, moments

        moments(torch.linspace(-1, 1, 1 << 16))  # a first call is compared with torch
        backends, faults = kernel_backends(), kernel_faults()
    except Exception as error:
        return Line("kernels", "bad", f"{type(error).__name__}: {' '.join(str(error).split())}")
    lacks = backends["cpu"] != "native"
    detail = ", ".join(f"{device}: {how}" for device, how in backends.items())
    return Line("kernels", "bad" if faults else "absent" if lacks else "fine", detail)


def _lightning() -> list[Line]:
    found = {name: _version(name) for name in ("lightning", "pytorch-lightning")}
    there = [f"{name} {version}" for name, version in found.items() if version]
    if not there:
        return [Line("Lightning", "absent", "pip install 'gradwatch[lightning]'; Watch works without")]

    def binds() -> str:
        from ..callbacks import GradWatch

        bases = sorted({c.__module__.partition(".")[0] for c in GradWatch.__mro__ if c.__name__ == "Callback"})
        return f"{', '.join(there)}; GradWatch is a callback of {' and '.join(bases)}"

    return [_guarded("Lightning", binds)]


def _tensorboard() -> list[Line]:
    version = _version("tensorboard")
    if version is None:
        return [Line("TensorBoard", "absent", "pip install 'gradwatch[tensorboard]'")]

    def plugin() -> str:
        points = [e for e in metadata.entry_points(group="tensorboard_plugins") if e.name == "gradwatch"]
        if not points:
            raise LookupError("TensorBoard does not see the plugin: gradwatch is not installed in this environment")
        loader = points[0].load()
        return f"{loader.__name__} of {points[0].value.partition(':')[0]}, seen by TensorBoard"

    return [Line("TensorBoard", "fine", version), _guarded("GradWatch tab", plugin)]


def _extras() -> list[Line]:
    versions = {name: _version(name) for name in OPTIONAL}
    return [Line(name, "fine" if v else "absent", v or "not installed") for name, v in versions.items()]


def _switches() -> list[Line]:
    return [Line(name, "fine", f"={os.environ[name]}") for name in SWITCHES if name in os.environ]


def _self_test() -> str:
    """Two steps of a small network, watched and not: the norms are right, and the weights the same bit for bit.

    Raises:
        AssertionError: they are not.
    """
    import torch

    from ..runs import read_run
    from ..watch import Watch

    def train(folder: str | None) -> tuple[list[float], list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.01), []
        watch = None if folder is None else Watch(model, optimizer, rules="observe", run_dir=folder)
        for _ in range(2):
            loss = model(torch.randn(16, 4, generator=generator)).square().mean()
            loss.backward()
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            )
            if watch is None:
                optimizer.step()
            else:
                watch.step(loss=loss)
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
        return norms, [p.detach() for p in model.parameters()]

    with tempfile.TemporaryDirectory() as folder:
        expected, untouched = train(None)
        _, watched = train(folder)
        recorded = read_run(folder).scalar("global_norm")[1].tolist()
    if not all(map(torch.equal, untouched, watched)):
        raise AssertionError("watched training gave other weights than unwatched training")
    if len(recorded) != 2 or any(abs(a - b) > 1e-5 * b for a, b in zip(recorded, expected, strict=True)):
        raise AssertionError(f"gradient norms {recorded} were recorded where {expected} was expected")
    return "two steps of Watch: norms as torch's, weights bit for bit as unwatched, run folder read back"
