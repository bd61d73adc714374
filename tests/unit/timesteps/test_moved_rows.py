"""Constants of a method come from the schedule as configured, also where another part's density moved
the rows away from its ends: through the command line, against the closed forms.
"""

import json
import sys
from typing import Any

import pytest

from speed_engine.__main__ import main


@pytest.fixture
def table(monkeypatch, capsys):
    """table(words...) -> what `python -m speed_engine table WORDS --json` prints."""

    def run(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["speed_engine", "table", *words, "--json"])
        code = main()
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run


FLOW = ("schedule=rectified_flow", "objective=flow", "learned_variance=false")
NARROW = "{kind: logit_normal, std: 0.1}"  # every row within t = 0.4 .. 0.6


def parts(*texts: str) -> tuple[str, str]:
    return "timesteps=combine", f"timesteps.parts=[{', '.join(texts)}]"


def rate(t: float) -> float:
    """du/dt of rectified flow; from 0 at both ends to 2 at t = 1/2."""
    return 2 * t * (1 - t) / (t * t + (1 - t) ** 2) ** 2


@pytest.mark.parametrize("kind", ["speed", "speed_u"])
@pytest.mark.parametrize("density", [NARROW, "logit_normal", "{kind: laplace, b: 1}", "uniform"])
def test_the_change_aware_weight_is_of_the_schedule(table, kind, density):
    """0.4 + 0.2 minmax(du/dt) with the ends 0 and 2 of du/dt, whatever else decides the density."""
    rows = table(*FLOW, *parts(density, f"{{kind: {kind}, k: 1, change_aware: weight}}"))["rows"]
    for row in rows[:: len(rows) // 64]:
        expected = 0.4 + 0.2 * rate(row["coordinate"]) / 2
        assert row["weight"] == pytest.approx(expected, abs=2e-5)


def test_one_method_alone_has_the_same_weight(table):
    rows = table(*FLOW, "timesteps=speed", "timesteps.k=20")["rows"]
    for row in [*rows[:: len(rows) // 64], rows[-1]]:
        expected = 0.4 + 0.2 * rate(row["coordinate"]) / 2
        assert row["weight"] == pytest.approx(expected, abs=2e-5)


def test_the_pure_weight_has_mean_one_over_time(table):
    """u runs from 0 to 1 over t, so the weight is du/dt itself."""
    pure = "{kind: speed_u, k: 1, change_aware: weight, pure: true}"
    rows = table(*FLOW, *parts(NARROW, pure))["rows"]
    for row in rows[:: len(rows) // 64]:
        assert row["weight"] == pytest.approx(rate(row["coordinate"]), rel=1e-4)


@pytest.mark.parametrize(
    ("mean", "shares"),
    [(0.0, (None, 0.0)), (6.0, (0.0, None))],  # all rows before, all rows beyond the threshold
)
def test_a_threshold_that_no_row_crosses_is_still_the_schedules(table, mean, shares):
    """1/alpha_bar reaches 139 at t = 0.92; rows that all lie on one side of it are no mistake."""
    density = f"{{kind: logit_normal, std: 0.1, mean: {mean:g}}}"
    shown = table(*FLOW, *parts(density, "{kind: speed_u, change_aware: 'off'}"))
    rows = shown["rows"]
    assert shown["timesteps"]["tau"] == (len(rows) if shares[0] is None else 0)
    assert {row["area"] == "convergence" for row in rows} == {shares[0] is not None}
    assert all(row["weight"] == 1 for row in rows)


def test_a_threshold_that_the_schedule_never_reaches_is_refused(monkeypatch, capsys):
    words = [*FLOW, *parts(NARROW, "{kind: speed_u, r: 1.0e+20}")]
    monkeypatch.setattr(sys, "argv", ["speed_engine", "table", *words, "--json"])
    assert main() == 2
    assert "never reaches r=1e+20" in capsys.readouterr().err


def test_official_ant_uw_weighs_the_variational_term(table):
    shown = table("timesteps=ant_uw", "timesteps.official=true")["timesteps"]
    assert shown["official"] is True and shown["weight_vb"] is True
    for words in ((), ("timesteps.official=false",)):
        shown = table("timesteps=ant_uw", *words)["timesteps"]
        assert shown["official"] is False and shown["weight_vb"] is False
