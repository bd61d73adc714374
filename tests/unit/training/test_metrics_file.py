"""metrics.jsonl is JSON whatever the numbers are, and is read whatever moment a run was killed at."""

import json

import pytest

from speed_engine.training.metrics_file import cut_off_after, line_of, read


def strict(text: str):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null():
    line = line_of({"step": 1, "loss": float("nan"), "by": [1.0, float("inf"), (-float("inf"),)]})
    assert line.endswith("\n") and line.count("\n") == 1
    assert strict(line) == {"step": 1, "loss": None, "by": [1.0, None, [None]]}


def lines(*steps: int) -> str:
    return "".join(line_of({"step": step, "loss": 1.0 * step}) for step in steps)


@pytest.mark.parametrize("end", ["", '{"st', '{"step": 4, "lo', "{", "\x00\x00", "[4]", "4"])
def test_a_half_written_last_line_is_passed_over(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3) + end)
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    cut_off_after(path, 3)
    with path.open("a") as file:
        file.write(lines(4))
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 27))
def test_killed_at_any_byte_a_resumed_run_appends_whole_lines(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2)[:-cut])
    cut_off_after(path, 1)
    with path.open("a") as file:
        file.write(lines(2))
    assert path.read_text() == lines(1, 2)


def test_steps_that_are_made_again_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_off_after(path, 3)
    assert not path.exists()
    path.write_text(lines(10, 20) + "broken\n" + lines(30))
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read(path)
    cut_off_after(path, 20)
    assert path.read_text() == lines(10, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_older_versions_wrote_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": NaN}\n{"step": 1, "loss": Infinity}\n{"step": 2, "loss": 3}\n'
    )
    assert read(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 3}]
    with pytest.raises(ValueError, match=r"nothing\.jsonl is missing"):
        read(tmp_path / "nothing.jsonl")
