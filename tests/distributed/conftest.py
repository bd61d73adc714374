"""Starts real training processes, as the launcher does, but without its seconds of start-up."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.warm import Nest, Warm

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "speed_engine" / "train.py"


def pytest_itemcollected(item: pytest.Item) -> None:
    """All of this folder starts processes, which takes seconds each."""
    item.add_marker(pytest.mark.slow)


def free_port() -> str:
    """A port that nobody holds at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_ranks(
    nest: Nest, command: list[str], world: int, cwd: Path | None = None, **environment: str
) -> list[Warm]:
    """`python command...` in `world` processes that find each other, one thread each."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    place |= {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [Warm(nest, command, env=place | rank, cwd=str(cwd or Path.cwd())) for rank in ranks]


COMMAND = f"""
import sys, warnings
sys.path[:1] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
warnings.simplefilter("ignore")
from speed_engine.__main__ import main
"""


@pytest.fixture
def command_in(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Warm]:
    """command_in(environment, words, before=""): `python -m speed_engine WORDS` after these lines of Python; of any
    launcher it is told this environment alone."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}

    def start(environment: dict[str, str], words: list[str], before: str = "") -> Warm:
        program = tmp_path_factory.mktemp("program") / "command.py"
        program.write_text(f"{COMMAND}{before}\nsys.exit(main())\n")
        told = bare | {"OMP_NUM_THREADS": "1"} | environment
        return Warm(nest, [str(program), *map(str, words)], env=told, cwd=str(Path.cwd()))

    return start


@pytest.fixture(scope="session")
def nest() -> Iterator[Nest]:
    """Where processes come from that start fast."""
    nest = Nest()
    yield nest
    nest.close()


@pytest.fixture(scope="session")
def run_ranks(nest):
    """run(script, folder, world, cases): the script with these arguments, in as many processes, to a good end."""

    def run(script: str, folder: Path, world: int, cases: list[str]) -> None:
        running = start_ranks(nest, [script, str(folder), *cases], world, DS_ACCELERATOR="cpu")
        outputs = [each.communicate(timeout=240)[0] for each in running]
        assert all(each.returncode == 0 for each in running), "\n".join(outputs)

    return run


class Launcher:
    """Runs `train.py` in `world` processes and waits for all of them."""

    def __init__(self, nest: Nest, folder: Path, data: Path) -> None:
        self.nest = nest
        self.folder = folder
        self.data = data

    def arguments(self, run: str, *overrides: str) -> list[str]:
        small = {
            "run_dir": self.folder / run,
            "data.path": self.data,
            "model.depth": 2,
            "model.hidden_size": 48,
            "model.num_heads": 2,
            "train.global_batch": 16,
            "log.every": 5,
        }
        small |= dict(override.split("=", 1) for override in overrides)
        return ["--config=digits_dit_tiny", *(f"{key}={value}" for key, value in small.items())]

    def deepspeed(self, world: int) -> list[str]:
        """DeepSpeed's own launcher and `train.py`; its default port may be another run's."""
        starter = str(Path(sys.executable).with_name("deepspeed"))
        here = ["--num_accelerators", str(world), "--master_port", free_port()]
        return [starter, *here, str(TRAIN)]

    def start(
        self, world: int, arguments: list[str], cwd: Path | None = None, program: Path = TRAIN
    ) -> list[Warm]:
        return start_ranks(self.nest, [str(program), *arguments], world, cwd or self.folder)

    def wait(self, processes: list, expect: int | None = 0) -> str:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        codes = [process.returncode for process in processes]
        if expect is not None:
            assert codes == [expect] * len(codes), "\n".join(outputs)
        return "\n".join(outputs)

    def train(self, run: str, *overrides: str, world: int = 1, expect: int | None = 0) -> str:
        return self.wait(self.start(world, self.arguments(run, *overrides)), expect)


@pytest.fixture(scope="session")
def launcher_in(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Launcher]:
    """launcher_in(folder): runs go there; the digits are written once, by whoever trains first."""
    data = tmp_path_factory.mktemp("digits") / "data"
    return lambda folder: Launcher(nest, folder, data)


@pytest.fixture
def launcher(launcher_in, tmp_path):
    return launcher_in(tmp_path)
