"""What a launcher says of this process's place: RANK and its four companions, or SLURM's own variables.

All of it or nothing: a half-told place (a WORLD_SIZE that a container left over, say) would train on a part of every
batch and count it as the whole, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WHICH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # enough for work that needs no network
NEEDED = (*WHICH, "MASTER_ADDR", "MASTER_PORT")
NEIGHBOURS = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
)  # processes of this machine: torchrun's, DeepSpeed's
# Another starter's place of this task and number of tasks, each in order of preference.
SLURM = (("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
MPI = (
    ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)
# What `accelerate launch` tells its own library, which nobody here reads: variable -> (the answers that
# ask for nothing, in small letters; what to say instead).
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": (("no",), "--mixed_precision no and engine.precision=bf16"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "--dynamo_backend no and engine.compile=block"),
    "ACCELERATE_USE_CPU": (("false",), "no --cpu, and engine.device=cpu"),
    "ACCELERATE_USE_DEEPSPEED": (("false",), "no --use_deepspeed, and engine.zero"),
    "ACCELERATE_USE_FSDP": (("false",), "no --use_fsdp, and engine.zero=3"),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "no --use_megatron_lm, and engine.zero"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        ("false",),
        "no --use_parallelism_config, and engine.zero",
    ),
}
CURE = (
    "start with torchrun or deepspeed's launcher, which set all of them, "
    "or unset them to run as one process"
)


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process. neighbours: processes on this machine. address, port: where all meet;
    empty and 0 where that was not asked for."""

    rank: int
    world: int
    local_rank: int
    neighbours: int
    address: str
    port: int


def place(environment: Mapping[str, str], needed: Sequence[str] = NEEDED) -> Place | None:
    """The place that `environment` tells; None where it tells none: one process, alone.

    needed: all of it, or WHICH. Raises ValueError where it tells a part only, something impossible, or what would be
    passed over.
    """
    for name, (nothing, instead) in ACCELERATE.items():
        if environment.get(name) and environment[name].lower() not in nothing:
            raise ValueError(
                f"accelerate launch asks for {name}={environment[name]}, which only accelerate itself reads; give it "
                f"{instead}, or use torchrun"
            )
    told = [name for name in needed if environment.get(name)]
    task = _slurm_task(environment) if "RANK" not in told else {}
    if not told and not task:
        return None
    environment = {**environment, **task}
    missing = [name for name in needed if not environment.get(name)]
    if missing and task:
        raise ValueError(
            f"SLURM started {task['WORLD_SIZE']} tasks, but {_words(missing)} not set; before srun: "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1) '
            "MASTER_PORT=29500, or ask for one task to run as one process"
        )
    if missing:
        raise ValueError(
            f"{_words(told)} set in the environment, but {_words(missing)} not; {CURE}"
        )
    world = _number(environment, "WORLD_SIZE", 1, 2**31 - 1)
    rank = _number(environment, "RANK", 0, world - 1)
    local_rank = _number(environment, "LOCAL_RANK", 0, world - 1)
    meets = "MASTER_PORT" in needed
    port = _number(environment, "MASTER_PORT", 1, 65535) if meets else 0
    given = [name for name in NEIGHBOURS if environment.get(name)]
    neighbours = _number(environment, given[0], local_rank + 1, world) if given else world
    address = environment["MASTER_ADDR"] if meets else ""
    return Place(rank, world, local_rank, neighbours, address, port)


def _slurm_task(environment: Mapping[str, str]) -> dict[str, str]:
    """This task's place in torch's words where srun started several, which only SLURM's words tell.

    A shell inside an allocation is no task. Raises ValueError for mpirun, whose words are not read.
    """
    for (ranks, worlds), starter in ((SLURM, "srun"), (MPI, "mpirun")):
        rank = next((name for name in ranks if environment.get(name)), None)
        world = next((name for name in worlds if environment.get(name)), None)
        if rank is None:
            continue
        count = 1 if world is None else _number(environment, world, 1, 2**31 - 1)
        place = _number(environment, rank, 0, 2**31 - 1)
        if place >= count:
            raise ValueError(
                f"{rank}={place} is set in the environment, but it tells of {count} "
                f"process{'es' if count > 1 else ''}; {CURE}"
            )
        if count == 1:
            continue
        if starter == "mpirun" or not environment.get("SLURM_LOCALID"):
            raise ValueError(
                f"{starter} started {count} processes, but "
                f"{_words(NEEDED if starter == 'mpirun' else ['SLURM_LOCALID'])} not set; {CURE}"
            )
        words = {"RANK": str(place), "WORLD_SIZE": str(count)}
        return words | {"LOCAL_RANK": environment["SLURM_LOCALID"]}
    return {}


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environment[name].strip()
    if text.isascii() and text.isdecimal() and len(text) < 12 and low <= int(text) <= high:
        return int(text)
    raise ValueError(
        f"{name}={environment[name]} is set in the environment, but it must be a whole number "
        f"from {low} to {high}; {CURE}"
    )


def _words(names: tuple[str, ...] | list[str]) -> str:
    """`A is`, `A and B are`, `A, B and C are`."""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{', '.join(names[:-1])} and {names[-1]} are"
