"""The pictures of tables are drawn for every kind of schedule, and show what the table holds."""

import importlib
import sys

import pytest

from speed_engine.reports import plots_table
from speed_engine.reports.table_compare import tables
from speed_engine.step_table import build_step_table
from speed_engine.timesteps import parse


def config(folder: str, kind: str, **options):
    return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**options)


@pytest.mark.parametrize(
    ("schedule", "objective", "timesteps"),
    [
        ("linear", "epsilon", "speed"),
        ("edm", "edm", "speed_u"),
        ("scaled_linear", "v", "infonoise"),
    ],
)
def test_pictures_of_one_table(tmp_path, schedule, objective, timesteps):
    table = build_step_table(
        config("schedules", schedule), config("objectives", objective), parse(timesteps)
    )
    paths = plots_table.plot_table(table, tmp_path / "plots")
    assert [path.name for path in paths] == [
        f"timesteps_{timesteps}_{schedule}.png",
        f"increments_{schedule}.png",
    ]
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert "matplotlib.pyplot" not in sys.modules


def test_sigma_is_drawn_on_a_logarithmic_axis(tmp_path):
    table = build_step_table(config("schedules", "edm"), config("objectives", "edm"), parse("edm"))
    text = plots_table.plot_table(table, tmp_path, "svg")[0].read_text()
    assert "sigma (small = clean, large = noise)" in text and "10^{-1}" in text.replace(
        "\\mathdefault", ""
    )


def test_curves_on_each_other_are_named(tmp_path):
    schedule = config("schedules", "linear")
    several = tables(schedule, config("objectives", "epsilon"), ["uniform", "speed", "min_snr"])
    text = plots_table.plot_comparison(several, tmp_path / "c.svg").read_text()
    assert "uniform = min_snr" in text and "= speed" not in text


def test_comparison(tmp_path):
    schedule = config("schedules", "linear", zero_terminal_snr=True)
    several = tables(schedule, config("objectives", "v"), ["uniform", "speed", "min_snr"])
    path = plots_table.plot_comparison(several, tmp_path / "compare.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
