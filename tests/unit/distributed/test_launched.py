"""A launcher's place is told whole or refused; what schedulers and containers leave behind misleads nobody."""

import itertools

import pytest

from speed_engine.distributed.launched import NEEDED, Place, place

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_the_whole_is_read():
    assert place(WHOLE) == Place(1, 4, 1, 4, "10.0.0.1", 29500)
    assert place(WHOLE | {"LOCAL_WORLD_SIZE": "2"}) == Place(1, 4, 1, 2, "10.0.0.1", 29500)
    assert place(WHOLE | {"LOCAL_SIZE": "2"}) == Place(1, 4, 1, 2, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        {"SLURM_JOB_ID": "7"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a shell inside an allocation
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # A batch's allocation of eight, and one task of it.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        {"LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_nothing_is_told(environment):
    assert place(environment) is None


PARTS = [
    names for count in range(1, 5) for names in itertools.combinations(NEEDED, count)
]  # all but none and all


@pytest.mark.parametrize("names", PARTS, ids=",".join)
def test_a_part_is_refused(names):
    with pytest.raises(ValueError, match="set in the environment, but") as caught:
        place({name: WHOLE[name] for name in names})
    for name in NEEDED:
        assert name in str(caught.value)
    assert "unset them" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RANK", ["4", "-1", "one", "1.0", "0x1", "١", "9" * 30]),
        ("WORLD_SIZE", ["0", "-2", "two", "1", "1e3"]),  # 1: this is process 1
        ("LOCAL_RANK", ["4", "-1", "x"]),
        ("MASTER_PORT", ["0", "65536", "http", "-1"]),
        ("LOCAL_WORLD_SIZE", ["0", "1", "5", "all"]),
    ],
)
def test_what_cannot_be_is_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=r"must be a whole number from \d+ to \d+"):
            place(WHOLE | {name: value})


@pytest.mark.parametrize(
    ("name", "nothing", "something", "instead"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", "bf16", "engine.precision=bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", "INDUCTOR", "engine.compile"),
        ("ACCELERATE_USE_CPU", "False", "True", "engine.device=cpu"),
        ("ACCELERATE_USE_DEEPSPEED", "false", "true", "engine.zero"),
        ("ACCELERATE_USE_FSDP", "false", "true", "engine.zero=3"),
        ("ACCELERATE_USE_MEGATRON_LM", "false", "true", "engine.zero"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "false", "true", "engine.zero"),
    ],
)
def test_accelerate_is_understood_or_refused(name, nothing, something, instead):
    """With torchrun's variables beside it, which it sets for several GPUs, and alone, as for one process."""
    for around in (WHOLE, {}):
        assert place(around | {name: nothing}) == place(around)
        with pytest.raises(ValueError, match=f"{name}={something}.*{instead}.*torchrun"):
            place(around | {name: something})
    with pytest.raises(ValueError, match="RANK"):  # several processes, of which it tells no places
        place({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", name: nothing})


def test_srun_is_understood_or_refused():
    assert place(SLURM | MEETING) == Place(3, 4, 1, 4, "node1", 29500)
    assert place(SLURM | WHOLE) == place(WHOLE)  # torchrun under srun: the inner one counts
    with pytest.raises(ValueError, match=r"SLURM started 4 tasks.*export MASTER_ADDR="):
        place(SLURM)
    with pytest.raises(ValueError, match="MASTER_PORT is not set"):
        place(SLURM | {"MASTER_ADDR": "node1"})
    with pytest.raises(ValueError, match="SLURM_LOCALID is not set"):
        place({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"} | MEETING)
    for wrong in ({"SLURM_PROCID": "4"}, {"SLURM_NTASKS": "two"}, {"SLURM_PROCID": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            place(SLURM | MEETING | wrong)
    with pytest.raises(ValueError, match="WORLD_SIZE is set in the environment, but RANK"):
        place({"WORLD_SIZE": "2", "SLURM_JOB_ID": "7"})


def test_mpirun_is_refused():
    with pytest.raises(ValueError, match="mpirun started 2 processes"):
        place({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})
    assert place({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None
