"""What the benchmark promises, on a part of it."""

import json

import faults
import pytest

pytestmark = pytest.mark.slow


def test_quick_benchmark_finds_most_faults_and_alarms_on_nothing_healthy(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert faults.main(["--quick", "--json", str(report)]) == 0
    rates = json.loads(report.read_text())["rates"]
    assert rates["tpr"] >= 0.8
    assert rates["fpr"] <= 0.06
    assert rates["control_alarms"] == 0
    assert "AutoTrainer" in capsys.readouterr().out


def test_preflight_finds_half_of_what_is_faulty_by_construction_and_nothing_on_sound_twins(capsys):
    assert faults.main(["--quick", "--preflight"]) == 0
    lines = {
        line.split(":")[0]: line.split(": ")[1].split() for line in capsys.readouterr().out.splitlines() if ": " in line
    }
    found, _, total, _ = lines["of those faulty by construction"]
    assert int(found) >= int(total) / 2
    assert lines["fixed and healthy with a finding"][0] == "0"


def test_unknown_program_is_an_error():
    with pytest.raises(SystemExit, match="no program begins with nothing"):
        faults.main(["--only", "nothing"])
