"""The recipes of guide/clusters.md, read as their launchers read them and run in an imitation of their clusters."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "speed_engine" / "guide" / "clusters.md").read_text(encoding="utf-8")
(SBATCH,) = re.findall(r"```sbatch\n(.*?)```", PAGE, re.DOTALL)
(HOSTFILE,) = re.findall(r"```hostfile\n(.*?)```", PAGE, re.DOTALL)
LINES = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]  # fmt: skip
TASKS = """#!/bin/bash
[ -n "$SRUN_CODE" ] && exit "$SRUN_CODE"
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" $SMALL > task-$rank.txt 2>&1 &
  started="$started $!"
done
code=0
for one in $started; do wait $one || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo node2; else echo "$@" > scontrol.txt; fi
"""


@pytest.fixture
def small(launcher) -> list[str]:
    """Settings that make any of the page's runs one of two steps on the digits."""
    settings = {
        "data.kind": "digits",
        "data.path": launcher.data,
        "model.size": "tiny/2",
        "model.depth": 1,
        "engine": "torch",
        "train.flip": "false",
        "train.steps": 2,
        "train.global_batch": 4,
        "log.every": 1,
        "validation.every": 2,
        "validation.samples": 64,
    }
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """A folder with the checkout in it, and an environment that knows no launcher but has the page's commands."""
    (tmp_path / "speed_engine").symlink_to(ROOT / "speed_engine")
    for name, text in (("srun", TASKS), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    words = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "OMPI_", "PMI_")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(words)}
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return bare | {"OMP_NUM_THREADS": "1", "PATH": path}


def bash(text: str, folder: Path, environment: dict[str, str]) -> int:
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, timeout=200, capture_output=True
    )
    return done.returncode


def steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())


def test_the_sbatch_file(tmp_path, place, small):
    """Two tasks train one run; a code of 75 puts the job back into the queue, 0 does not."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = place | job | {"SMALL": " ".join(small)}
    text = SBATCH.replace("MASTER_PORT=29500", f"MASTER_PORT={free_port()}")
    bash(text, tmp_path, environment)
    told = [(tmp_path / f"task-{rank}.txt").read_text() for rank in range(2)]
    assert steps(tmp_path / "runs" / "xl2") == 2, told
    assert "finished: step 2" in told[0] and "finished" not in told[1]
    assert not (tmp_path / "scontrol.txt").exists()
    bash(text, tmp_path, environment | {"SRUN_CODE": "75"})
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def test_a_mistake_is_told_by_one_process(tmp_path, place, small):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = place | job | {"SMALL": " ".join([*small, "optim.lrr=1"])}
    bash(SBATCH, tmp_path, environment)
    told = [(tmp_path / f"task-{rank}.txt").read_text() for rank in range(2)]
    assert "unknown key optim.lrr" in told[0] and "did you mean" in told[0]
    assert told[1] == ""


def test_torchrun_reads_its_lines():
    """What it then sets for each process is what `start_ranks` sets in every other test of this folder."""
    from torch.distributed.run import get_args_parser

    lines = [line for line in LINES if line.startswith("torchrun")]
    one, many = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    for read in (one, many):
        assert read.training_script == "speed_engine/train.py" and read.nproc_per_node == "8"
        assert read.training_script_args[:2] == ["--config", "imagenet256_dit_xl2"]
    assert (many.nnodes, many.node_rank, many.master_addr, many.master_port) == (
        "2",
        0,
        "node1",
        29500,
    )


def test_deepspeeds_launcher_reads_its_line_and_the_hostfile(tmp_path):
    from deepspeed.launcher import runner

    (tmp_path / "hostfile").write_text(HOSTFILE)
    (line,) = [line for line in LINES if line.startswith("deepspeed --hostfile")]
    for more in ("", " --no_ssh --node_rank 1"):
        given = line.replace(" --master_addr", f"{more} --master_addr")
        arguments = runner.parse_args(shlex.split(given)[1:])
        assert arguments.user_script == "speed_engine/train.py"
        assert arguments.master_addr == "node1" and arguments.no_ssh == bool(more)
        assert arguments.user_args[:2] == ["--config", "imagenet256_dit_xl2"]
    found = runner.fetch_hostfile(str(tmp_path / "hostfile"))
    assert dict(found) == {"node1": 8, "node2": 8}


@pytest.mark.parametrize("how", ["--no_ssh_check", "--no_ssh --node_rank 0"])
def test_a_hostfile_on_one_machine(tmp_path, place, small, how):
    """DeepSpeed's launcher itself, as far as it goes without ssh: both processes of the file train one run."""
    assert how in PAGE
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    (line,) = [line for line in LINES if line.startswith("deepspeed --hostfile")]
    where = f"{how} --master_addr 127.0.0.1 --master_port {free_port()}"
    line = line.replace("--master_addr node1", where).replace("/shared/", "")
    code = bash(" ".join([line, *small]), tmp_path, place | {"DS_ACCELERATOR": "cpu"})
    run = tmp_path / "runs" / "xl2"
    assert code == 0 and steps(run) == 2
    assert json.loads((run / "manifest.json").read_text())["processes"] == 2


def test_what_accelerate_asks_of_itself_is_refused(tmp_path, place, small):
    """Its variables as its launcher sets them; what is understood is in tests/unit/distributed."""
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    line = ["python speed_engine/train.py --config imagenet256_dit_s2 run_dir=run", *small]
    assert bash(" ".join(line), tmp_path, place | asked) == 2
    assert not (tmp_path / "run").exists()


def test_every_line_is_one_that_a_shell_reads():
    for text in (SBATCH, *LINES):
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
