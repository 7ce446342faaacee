"""Paths without what wrappers put into them: one list, of which every floor speaks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import Watch
from gradwatch.hooks import HookManager
from gradwatch.torchside import WRAPPER_PARTS, clean_path
from gradwatch.treatments import ClipByNorm


class Wrapper(nn.Module):
    """A wrapper like torch's own: the inner module under a private name."""

    def __init__(self, part: str, inner: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, inner)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.get_submodule(self.part)
        return inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", sorted(WRAPPER_PARTS))
def test_the_path_on_record_is_taken_by_treatments_and_hooks(part: str) -> None:
    model = nn.Sequential(Wrapper(part, nn.Linear(4, 4)), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, treatments=[ClipByNorm(0.1, paths="0.weight")]) as watch:
        model(torch.eye(4)).sum().backward()
        record = watch.step().record
    assert record is not None
    assert "0.weight" in record.index.paths
    assert [t.applied for t in record.treatments] == [True]
    with HookManager(model) as hooks:
        assert hooks.points("0:output")


@pytest.mark.parametrize(
    ("path", "parallel", "clean"),
    [
        pytest.param("0._wrapped_module", False, "0", id="module-at-the-end"),
        pytest.param("_orig_mod.h.0._checkpoint_wrapped_module.weight", False, "h.0.weight", id="several"),
        pytest.param("my_orig_mod.weight", False, "my_orig_mod.weight", id="part-of-a-name"),
        pytest.param("module.weight", False, "module.weight", id="users-own-module"),
        pytest.param("module.weight", True, "weight", id="data-parallel"),
        pytest.param("", False, "", id="root"),
    ],
)
def test_clean_path_leaves_out_whole_parts_alone(path: str, parallel: bool, clean: str) -> None:
    assert clean_path(path, parallel=parallel) == clean


def test_names_of_wrappers_stand_in_one_file() -> None:
    root = Path(gradwatch.__file__).parent
    files = [f for f in root.rglob("*.py") if "_checkpoint_wrapped_module" in f.read_text(encoding="utf-8")]
    assert [f.relative_to(root).as_posix() for f in files] == ["torchside/_paths.py"]
