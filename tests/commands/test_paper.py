"""The paper as a file: every row is a run that can be configured, or says why it is none; its commands are real."""

from __future__ import annotations

import shlex

import pytest

from speed_engine.reports import paper
from speed_engine.training.assembly import build_table

ROWS = paper.rows()
RUNS = {name: row for name, row in ROWS.items() if row.preset}


def test_every_row_is_listed(good):
    # A row that is too long for a terminal goes on below, indented.
    lines = good("paper").out.replace("\n" + " " * 29, " ").splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)
    assert len(RUNS) > 70 and all(row.why_not for name, row in ROWS.items() if name not in RUNS)
    assert all(row.ours for row in RUNS.values())


def test_every_run_has_a_table_of_its_own_settings():
    made = {}
    for name, row in RUNS.items():
        config = row.config()
        key = config.model_dump_json(include={"schedule", "objective", "timesteps"})
        if key not in made:
            made[key] = build_table(config)
        density = made[key].density
        assert abs(float(density.sum()) - 1) < 1e-6, name
    assert len(made) > 20


@pytest.mark.parametrize("name", ["tab2_metfaces_p2", "tab11_edm_speed", "fig6a_mdt", "tab5_text"])
def test_a_row_tells_its_commands(good, name):
    said = good("paper", name).out
    assert ROWS[name].reported in said and "parameters" in said
    assert "predicted, not measured" in said and "hours on 8 NVIDIA A100" in said
    encode, train, sample, score = said.strip().splitlines()[-4:]
    assert encode.startswith("python -m speed_engine encode --images")
    words = shlex.split(train)
    assert words[:4] == ["deepspeed", "speed_engine/train.py", "--config", ROWS[name].preset]
    changes = [word for word in words[4:] if not word.startswith("run_dir=")]
    assert tuple(changes) == ROWS[name].overrides  # as the shell hands them over
    run = words[4].removeprefix("run_dir=")
    assert f"--run {run}" in sample and "--reference" in score


def test_known_sizes(good):
    assert "parameters 35.88 M" in good("paper", "tab3_unet_ffhq_speed").out
    assert "parameters 36.39 M" in good("paper", "tab3_unet_imagenet_speed").out


def test_what_training_computes_is_counted(good):
    """MDT goes through two passes, of which the second leaves 0.3 of the tokens out of ten of twelve blocks."""
    said = good("paper", "fig6a_mdt").out
    flop = float(said.split(" FLOP")[0].split()[-1])
    plan = good("plan", "--config", "imagenet256_mdt_s2").out
    one = float(plan.split(" GMAC")[0].split()[-1]) * 1e9
    assert 1.5 < flop / (6 * one * 256 * 1_000_000) < 1.9


def test_a_row_that_is_none_names_the_closest(command, good):
    answer = command("paper", "tab2_metfaces_sped")
    assert answer.code == 2 and "did you mean 'tab2_metfaces_speed'" in answer.err
    assert "no run" in good("paper", "faceforensics").out
