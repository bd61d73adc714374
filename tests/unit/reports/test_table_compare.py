"""Where the methods' loss falls by log-SNR, against the published shares on linear DDPM."""

import csv
import io
import json

import pytest

from speed_engine.objectives import epsilon
from speed_engine.reports.table_compare import BINS, compare, shares, tables
from speed_engine.schedules import linear
from speed_engine.step_table import build_step_table
from speed_engine.timesteps import parse


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ("uniform", ".021 .087 .151 .197 .246 .298"),
        ("p2", ".000 .006 .063 .195 .325 .411"),
        ("min_snr_speed_release", ".000 .006 .063 .195 .325 .411"),
        ("min_snr", ".000 .027 .161 .216 .269 .326"),
        ("debiased", ".000 .001 .006 .019 .084 .891"),
        ("speed", ".024 .114 .235 .283 .281 .063"),
        ("speed_official", ".033 .135 .243 .280 .235 .074"),
        (
            {"kind": "speed_u", "pure": True, "k": 1, "change_aware": "weight"},
            ".006 .113 .382 .379 .113 .007",
        ),
        (
            {"kind": "speed_u", "pure": True, "k": 1, "change_aware": "density"},
            ".006 .113 .382 .379 .113 .007",
        ),
    ],
)
def test_shares_on_linear_ddpm(timesteps, expected):
    table = build_step_table(linear.Config(), epsilon.Config(), parse(timesteps))
    found = shares(table).tolist()
    assert found == pytest.approx([float(value) for value in expected.split()], abs=6e-4)


def test_formats():
    both = tables(linear.Config(), epsilon.Config(), ["uniform", "speed"])
    lines = compare(both).splitlines()
    assert lines[0].split() == ["log-SNR", *BINS]
    assert lines[2].split()[0] == "speed"
    assert lines[1].split()[-1] == "0.298"
    parsed = json.loads(compare(both, "json"))
    assert sum(parsed["shares"]["speed"]) == pytest.approx(1)
    rows = list(csv.reader(io.StringIO(compare(both, "csv"))))
    assert rows[0] == ["method", *BINS]
    with pytest.raises(ValueError, match="not as 'xml'"):
        compare(both, "xml")
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        tables(linear.Config(), epsilon.Config(), ["unifrom"])
