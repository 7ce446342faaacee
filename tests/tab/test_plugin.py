"""The door of the plugin: TensorBoard must start whatever happens behind it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tensorboard_plugin_gradwatch.plugin import PLUGIN_NAME, SAMPLES, GradwatchPlugin


def test_all_samples_are_asked_for_before_the_data_are_read():
    flags = SimpleNamespace(samples_per_plugin={"images": 3})
    GradwatchPlugin().fix_flags(flags)
    assert flags.samples_per_plugin == {"images": 3, PLUGIN_NAME: SAMPLES}


def test_number_of_samples_that_the_user_gives_holds():
    flags = SimpleNamespace(samples_per_plugin={PLUGIN_NAME: 7})
    GradwatchPlugin().fix_flags(flags)
    assert flags.samples_per_plugin == {PLUGIN_NAME: 7}


def test_flags_of_another_tensorboard_are_borne():
    flags = SimpleNamespace()
    GradwatchPlugin().fix_flags(flags)
    assert vars(flags) == {}


@pytest.mark.parametrize("context", [SimpleNamespace(data_provider=None), SimpleNamespace()], ids=["none", "absent"])
def test_without_a_data_provider_the_tab_stays_away(context, caplog):
    assert GradwatchPlugin().load(context) is None
    assert "data provider" in caplog.text


def test_failure_while_loading_is_logged_and_not_raised(caplog):
    broken = SimpleNamespace(data_provider=object(), sampling_hints={PLUGIN_NAME: "many"})
    assert GradwatchPlugin().load(broken) is None
    assert "TensorBoard goes on without it" in caplog.text


def test_entry_point_leads_to_the_loader():
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="tensorboard_plugins") if e.name == "gradwatch"]
    assert {e.load() for e in found} == {GradwatchPlugin}


def test_plugin_imports_no_torch_and_of_gradwatch_what_reads_runs_alone():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import tensorboard_plugin_gradwatch.plugin, tensorboard_plugin_gradwatch._tab\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('gradwatch.')}\n"
        "more = rooms & {'watch', 'hooks', 'callbacks', 'treatments', 'stats', 'torchside', 'report', 'cli'}\n"
        "sys.exit(str(more) if more else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
