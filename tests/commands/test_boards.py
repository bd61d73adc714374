"""TensorBoard and W&B: what they are given, what a resume does to them, and that none of them stops training."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from speed_engine import config as configuration
from speed_engine.training import boards


class Service(types.ModuleType):
    """In place of W&B's package: notes what it is told, and fails where it is asked to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails = fails
        self.runs: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.tries = self.finished = 0

    def _maybe_fail(self, where: str) -> None:
        if where == self.fails:
            self.tries += 1
            raise ConnectionError(f"no {where}")

    def init(self, **told):
        self._maybe_fail("init")
        self.runs.append(told)
        return self

    def log(self, values: dict, step: int) -> None:
        self._maybe_fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._maybe_fail("finish")
        self.finished += 1


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def going_on(good, overrides, run, tmp_path, monkeypatch):
    """going_on(service, settings...) -> (folder, what was said) of a copy of the tiny run that trains on."""

    def command(service, *settings: str):
        monkeypatch.setitem(sys.modules, "wandb", service)
        copy = tmp_path / "run"
        if not copy.exists():
            shutil.copytree(run, copy)
        words = [w for w in overrides(copy) if not w.startswith(("train.steps", "log.every"))]
        answer = good("train", "--config", "digits_dit_tiny", *words, "log.every=2", *settings)
        return copy, answer.out + answer.err

    return command


def test_wandb_gets_settings_and_numbers_and_a_resumed_run_goes_on_there(going_on):
    service = Service()
    named = ["log.wandb=true", "log.wandb_project=speed", "log.wandb_group=twins"]
    copy, _ = going_on(service, *named, "train.steps=22")
    going_on(service, *named, "log.wandb_name=mine", "train.steps=24")
    first, second = service.runs
    assert (first["project"], first["group"], first["name"]) == ("speed", "twins", "run")
    assert second["name"] == "mine" and first["config"]["train"]["steps"] == 22
    assert first["id"] == second["id"] == (copy / "wandb_id").read_text().strip()
    assert len(first["id"]) == 16 and first["resume"] == second["resume"] == "allow"
    assert [step for step, _ in service.logged] == [22, 24] and service.finished == 2
    line = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    assert service.logged[-1][1]["loss"] == line["loss"] and service.logged[-1][1]["grad_norm"] > 0


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_board_that_fails_is_one_warning(going_on, place):
    service = Service(place)
    copy, said = going_on(service, "log.wandb=true", "train.steps=24")
    assert said.count("WARNING") == 1 and service.tries == 1
    assert f"WARNING: W&B failed (ConnectionError: no {place})" in said and "goes on" in said
    assert steps_of(copy)[-2:] == [22, 24] and "finished: step 24" in said


def test_a_file_in_place_of_tensorboards_folder_is_one_warning(going_on, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    (tmp_path / "run" / "tensorboard").write_text("mine")
    copy, said = going_on(None, "log.tensorboard=true", "train.steps=22")
    assert said.count("WARNING: TensorBoard failed") == said.count("WARNING") == 1
    assert steps_of(copy)[-1] == 22 and (copy / "tensorboard").read_text() == "mine"


def test_no_step_stands_twice_on_tensorboard(going_on):
    """Steps 22 and 24 are made, their checkpoint is lost, and they are made again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    copy, _ = going_on(None, "log.tensorboard=true", "train.steps=24")
    shutil.rmtree(copy / "checkpoints" / "step-00000024")
    going_on(None, "log.tensorboard=true", "train.steps=26")
    shown = EventAccumulator(str(copy / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [10, 20, 22, 24, 26]


def test_wandb_tells_that_it_keeps_points_of_steps_that_are_trained_again(tmp_path):
    said: list[str] = []
    all_boards = boards.Boards(said.append)
    config = configuration.load("digits_dit_tiny")
    all_boards.add("W&B", lambda: boards.WandB(Service(), tmp_path, config))
    all_boards.rewind(30)
    (sentence,) = said
    assert sentence.startswith("WARNING: W&B keeps its points of the steps after 30")
