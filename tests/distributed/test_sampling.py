"""`sample` in several processes: one process's pictures, continued after a kill, mistakes told once."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.__main__ import main
from tests.distributed.conftest import free_port
from tests.distributed.warm import Warm

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "golden" / "run_format_1" / "run"
NUM = 24
Start = Callable[[int, Path], list[Warm]]


def words(out: Path) -> list[str]:
    command = ["sample", f"--run={RUN}", f"--num={NUM}", "--sampler=ddim", "--steps=4"]
    return [*command, "--batch-size=2", f"--out={out}"]


@pytest.fixture
def start(command_in: Callable[..., Warm]) -> Start:
    """start(world, out): the command in as many processes."""

    def ranks(world: int, out: Path) -> list[Warm]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        return [command_in(place | own, words(out)) for own in each]

    return ranks


def finish(running: list[Warm]) -> list[tuple[int, str]]:
    said = [each.communicate(timeout=200)[0] for each in running]
    return [(each.returncode, text) for each, text in zip(running, said, strict=True)]


def here(out: Path) -> None:
    """The same command in this process, on as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed_engine", *words(out)])
        assert main() == 0
    torch.set_num_threads(threads)


def pictures(out: Path) -> np.ndarray:
    files = sorted((out / "images").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(NUM)]
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    here(out)
    return out


def test_two_draw_what_one_draws_and_say_so_once(start: Start, alone: Path, tmp_path: Path) -> None:
    answers = finish(start(2, tmp_path / "out"))
    assert [code for code, _ in answers] == [0, 0], answers
    assert f"{NUM} samples in {tmp_path / 'out'}" in answers[0][1]
    assert answers[1][1].strip() == ""
    names = sorted(str(p.relative_to(alone)) for p in alone.rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (alone / name).read_bytes(), name


def test_killed_and_continued_by_another_number(start: Start, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(2, out)
    limit = time.monotonic() + 120
    while len(list(out.glob("images/*.png"))) < 4 and time.monotonic() < limit:
        time.sleep(0.005)
    running[1].send_signal(signal.SIGKILL)
    code, said = finish(running[:1])[0]  # the one that is left
    running[1].wait()
    assert code == 0 or (code == 2 and "the same command continues" in said), said
    (out / "grid.png").unlink(missing_ok=True)
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("images/*.png")}
    assert len(kept) >= 4
    here(out)
    assert np.abs(pictures(out) - pictures(alone)).max() <= 1  # other batches: other roundings
    assert all((out / "images" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert (out / "grid.png").exists() and len(np.load(out / "samples.npz")["arr_0"]) == NUM
