"""Energy, emissions and cost: metered without a network or files, summed over the processes of a run."""

import socket
import sys
import types
from pathlib import Path

import pytest
from tiny_run import TRAINING, ends_at, make_run, train

from nanophi.core.errors import UserError
from nanophi.core.files import read_json
from nanophi.core.recipe import Training

METERED = {"track_energy": True, "country_iso_code": "FRA"}


@pytest.fixture
def fake_codecarbon(monkeypatch):
    """A codecarbon whose every reading is half a kilowatt-hour and 30 grams more than the one before."""
    log: list[str] = []

    class OfflineEmissionsTracker:
        def __init__(self, *, country_iso_code, output_handlers, output_methods, **kwargs):
            assert (country_iso_code, output_methods) == ("FRA", [])
            self.handlers, self.readings = output_handlers, 0

        def flush(self):
            self.readings += 1
            total = types.SimpleNamespace(energy_consumed=0.5 * self.readings, emissions=0.03 * self.readings)
            for handler in self.handlers:
                handler.out(total, None)

        def start(self):
            log.append("start")

        def stop(self):
            log.append("stop")

    source = types.SimpleNamespace(get_global_energy_mix_data=lambda: {"FRA": {}, "USA": {}})
    modules = {
        "codecarbon": {"OfflineEmissionsTracker": OfflineEmissionsTracker},
        "codecarbon.input": {"DataSource": lambda: source},
        "codecarbon.output_methods": {},
        "codecarbon.output_methods.base_output": {"BaseOutput": object},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return log


def test_energy_sums_over_the_processes_of_a_run(tmp_path, fake_codecarbon):
    run = make_run(tmp_path / "run")
    with ends_at(13):
        train(run, **METERED)  # saves at 6, 10 and 12: three readings
    assert fake_codecarbon == ["start", "stop"]
    summary = train(run, **METERED)  # at 18, 19 (before the decay) and 24: three more
    assert fake_codecarbon == ["start", "stop"] * 2
    assert (summary["energy_kwh"], summary["co2_grams"]) == pytest.approx((3.0, 180))
    assert summary["co2_region"] == "FRA"
    assert "codecarbon" in summary["co2_source"]
    assert read_json(run / "training.json")["summary"] == summary
    assert train(run, **METERED) == summary  # finished: nothing is metered again


def test_meter_is_refused_or_skipped_in_one_line(tmp_path, fake_codecarbon, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"does not know the country 'XXX'; give the three letters of ISO 3166"):
        train(run, track_energy=True, country_iso_code="XXX")
    with pytest.raises(ValueError, match="track_energy needs country_iso_code"):
        Training(**TRAINING, track_energy=True)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    summary = train(run, **METERED)
    assert "codecarbon is not installed: pip install 'nanophi[energy]'" in capsys.readouterr().out
    assert summary["steps"] == 24
    assert not {"energy_kwh", "co2_grams", "cost_usd"} & set(summary)


def test_codecarbon_meters_without_network_or_files(tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")
    run = make_run(tmp_path / "run")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "cwd"))

    def refuse(self, address):
        raise AssertionError(f"connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    summary = train(run, **METERED)
    assert summary["energy_kwh"] > 0
    assert 0 < summary["co2_grams"] / summary["energy_kwh"] < 1000  # grams per kilowatt-hour
    assert not list(Path().iterdir())
    assert {path.name for path in run.iterdir()} == {"checkpoints", "data", "training.json", "training_state"}


def test_cost_counts_hours_of_all_processes(tmp_path, capsys):
    run, price = make_run(tmp_path / "run"), {"dollars_per_hour": 3600.0}  # a dollar a second
    with ends_at(13):
        train(run, **price)
    assert "$" in capsys.readouterr().err
    log = read_json(run / "training_state/step-000012/trainer_state.json")["log_history"]
    before = next(entry["cost_usd"] for entry in reversed(log) if "cost_usd" in entry)
    summary = train(run, **price)
    line = [line for line in capsys.readouterr().err.splitlines() if "train step" in line][-1]
    assert line.endswith(f"${summary['cost_usd']:.2f} of ${summary['cost_usd']:.2f}")
    # Evaluations and saving are paid for too, so it is at least the time that counts as training.
    assert summary["cost_usd"] > max(summary["seconds"], before) > 0
