"""The package's door: every name is there, nothing heavy comes with it."""

import subprocess
import sys

import pytest

import gradwatch.hooks


@pytest.mark.parametrize("name", gradwatch.hooks.__all__)
def test_every_name_in_all_is_there(name):
    assert getattr(gradwatch.hooks, name) is not None


def test_an_unknown_name_suggests():
    with pytest.raises(AttributeError, match="Did you mean 'HookManager'"):
        gradwatch.hooks.HookManger  # noqa: B018


@pytest.mark.slow
def test_a_hook_manager_needs_neither_matplotlib_nor_safetensors_nor_the_compiler():
    code = (
        "import sys, torch; from gradwatch.hooks import HookManager, patch; m = torch.nn.Linear(2, 2);"
        "HookManager(m).run_with_cache(torch.ones(1, 2));"
        "print([n for n in ('matplotlib', 'safetensors', 'transformers', 'torch._dynamo') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
