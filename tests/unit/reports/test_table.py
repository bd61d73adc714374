"""What `python -m speed_engine table` prints."""

import csv
import importlib
import io
import json
import sys
from pathlib import Path

import pytest

from speed_engine.reports.table import ROW_KEYS, report
from speed_engine.step_table import build_step_table

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "timesteps.json"


def make(
    schedule="linear", objective="epsilon", timesteps="speed", schedule_options=None, **options
):
    def config(folder, kind, **values):
        return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**values)

    return build_step_table(
        config("schedules", schedule, **(schedule_options or {})),
        config("objectives", objective),
        config("timesteps", timesteps, **options),
    )


def test_json():
    parsed = json.loads(report(make(k=5, lam=0.6, tau=700), "json"))
    assert parsed["schedule"]["kind"] == "linear"
    assert parsed["schedule"]["gradient_peak"] == 219
    assert parsed["timesteps"]["tau"] == 700
    assert parsed["timesteps"]["expected_weight"] == pytest.approx(0.49648, abs=5e-6)
    assert parsed["timesteps"]["area_mass"]["convergence"] == pytest.approx(60 / 760)
    rows = parsed["rows"]
    assert len(rows) == 1000
    assert list(rows[0]) == list(ROW_KEYS)
    assert rows[0]["t"] == 0
    assert [rows[t]["area"] for t in (0, 300, 800)] == [
        "acceleration",
        "deceleration",
        "convergence",
    ]
    assert sum(row["density"] for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "laplace"])
def test_the_schedule_is_described_whatever_the_density(timesteps):
    """1 / alpha_bar of rectified flow reaches 139 at t = 0.922."""
    table = make("rectified_flow", "flow", timesteps)
    told = json.loads(report(table, "json"))["schedule"]
    assert told["area_shares"]["convergence"] == pytest.approx(0.078, abs=1e-3)
    assert sum(told["area_shares"].values()) == pytest.approx(1)
    assert told["alpha_bar_first"] == pytest.approx(1) and told["alpha_bar_last"] < 1e-8


def test_the_resolved_threshold_is_printed():
    parsed = json.loads(report(make("cosine", r=139), "json"))
    assert parsed["timesteps"]["tau"] == 945
    assert parsed["timesteps"]["r"] == 139
    assert parsed["timesteps"]["r_at_tau"] >= 139
    fixed = json.loads(report(make("cosine"), "json"))["timesteps"]
    assert fixed["r_at_tau"] == pytest.approx(4.95, abs=5e-3)  # 700 is no convergence area there
    assert "tau=945" in report(make("cosine", r=139), "text")


def test_csv():
    lines = list(csv.DictReader(io.StringIO(report(make(), "csv"))))
    assert len(lines) == 1000
    assert float(lines[219]["weight"]) == pytest.approx(0.6)
    assert lines[219]["area"] == "deceleration"


def test_zero_snr_is_null_in_json():
    table = make("linear", "v", schedule_options={"zero_terminal_snr": True})
    assert json.loads(report(table, "json"))["rows"][-1]["log_snr"] is None
    assert "-inf" in report(table)


def test_short_and_unthresholded_tables():
    text = report(make(timesteps="uniform", schedule_options={"num_steps": 10}))
    head, _, rows = text.partition("\n\n")
    assert head.count(" kind=") == 3 and len(rows.splitlines()) == 1 + 10
    short = make("scaled_linear", timesteps="uniform", schedule_options={"beta_end": 0.005})
    assert json.loads(report(short, "json"))["timesteps"]["area_mass"]["convergence"] == 0


def test_unknown_format():
    with pytest.raises(ValueError, match="not as 'xml'"):
        report(make(), "xml")


@pytest.mark.parametrize("row", json.loads(GOLDEN.read_text())["rows"], ids=lambda r: r["schedule"])
def test_the_command_line_agrees_with_the_golden_file(row, capsys, monkeypatch):
    """`python -m speed_engine table --json ...`, as a user types it, with tau and with r."""
    from speed_engine.__main__ import main

    def table(*words: str) -> dict:
        words = (
            "table",
            "--json",
            f"schedule.kind={row['schedule']}",
            "timesteps.kind=speed",
            *words,
        )
        monkeypatch.setattr(sys, "argv", ["speed_engine", *words])
        assert main() == 0
        return json.loads(capsys.readouterr().out)

    shown = table(
        f"timesteps.k={row['k']}", f"timesteps.lam={row['lam']}", f"timesteps.tau={row['tau']}"
    )
    for key in ("alpha_bar", "density", "weight"):
        for t, value in row[key].items():
            assert shown["rows"][int(t)][key] == pytest.approx(value, rel=1e-9), (key, t)
    assert table(f"timesteps.r={row['r']}")["timesteps"]["tau"] == row["tau_from_r"]
