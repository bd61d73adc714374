"""Every command as a user types it, in this process; one tiny run, trained once, for all of them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from speed_engine.__main__ import main
from speed_engine.progress import wrapped


@dataclass(frozen=True)
class Answer:
    """What a command left behind: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """All of both, however its lines were broken."""
        return " ".join(f"{self.out} {self.err}".split())


class Terminal(io.StringIO):
    """Where somebody reads along."""

    def isatty(self) -> bool:
        return True


def speed_engine(*words: str | Path, watched: bool = False) -> Answer:
    """`python -m speed_engine WORDS` in this process. watched: what it says on standard error goes to a terminal.

    Whatever the command, what people read of it fits. What programs read may be wide: JSON, CSV, tables of scores, and
    the log of a training that goes to a file.
    """
    out, err = io.StringIO(), Terminal() if watched else io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed_engine", *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main()
            except SystemExit as end:  # argparse: --help, and what it refuses
                code = int(end.code or 0)
    wide = words[:1] == ("train",) or {"--json", "--csv", "--compare"} & set(words)
    read = [] if wide else out.getvalue().splitlines()
    read += err.getvalue().splitlines() if watched else []
    assert not [line for line in read if wrapped(line) != line and len(line.split()) > 1], words
    return Answer(code, out.getvalue(), err.getvalue())


def to_a_good_end(*words: str | Path) -> Answer:
    answer = speed_engine(*words)
    assert answer.code == 0, answer.err
    return answer


@pytest.fixture(scope="session")
def command() -> Callable[..., Answer]:
    """command(words...) -> Answer, whatever its exit code."""
    return speed_engine


@pytest.fixture(scope="session")
def good() -> Callable[..., Answer]:
    """command(words...) -> Answer; an exit code other than 0 is a failure."""
    return to_a_good_end


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards, made by `encode`."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    to_a_good_end("encode", "--images", "digits", "--out", folder, "--shard-size", "1000")
    return folder


# Twenty steps, bold ones: enough for labels and weights to show in the samples.
SETTINGS: dict[str, Any] = {
    "engine": "torch",
    "train.steps": 20,
    "train.global_batch": 16,
    "checkpoint.every": 10,
    "log.every": 10,
    "optim.lr": 5e-3,
    "optim.warmup_steps": 16,
    "optim.ema_decay": 0.8,
    "timesteps.k": 4,
}


@pytest.fixture(scope="session")
def overrides(data: Path) -> Callable[[Path], list[str]]:
    """overrides(run folder) -> the words after `--config digits_dit_tiny` of the tiny run."""

    def words(run: Path) -> list[str]:
        every = {"run_dir": run, "data.path": data, **SETTINGS}
        return [f"{key}={value}" for key, value in every.items()]

    return words


@pytest.fixture(scope="session")
def run(overrides: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: read it, change copies only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    to_a_good_end(
        "train", "--config", "digits_dit_tiny", *overrides(folder), "log.tensorboard=true"
    )
    return folder


@pytest.fixture(scope="session")
def samples(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples of the run, two of each class, scored: read them, change copies only."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    to_a_good_end("sample", *SAMPLE, "--run", run, "--out", folder)
    to_a_good_end("score", "--samples", folder, "--reference", "digits")
    return folder


SAMPLE = ["--num", "20", "--sampler", "ddim", "--steps", "5", "--guidance", "1.5"]


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], Any]:
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def listing() -> Callable[[Path], dict[str, bytes]]:
    """listing(folder) -> every file below it with its content; locks hold nothing to be kept."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock")
    }


@pytest.fixture(scope="session")
def is_a_picture() -> Callable[[Path], bool]:
    """Whether a PNG shows something: large enough to look at, and of more than a few grey levels."""
    from PIL import Image

    def shows(path: Path) -> bool:
        with Image.open(path) as picture:
            levels = picture.convert("L")
            return min(picture.size) >= 150 and len(levels.getcolors(256) or []) > 8

    return shows
