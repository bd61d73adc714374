"""AdamWEMA as DeepSpeed's client optimizer: ZeRO 0 to 3, one and two gloo processes, float32 and bf16.

Run as a script, this file is one of the processes: arguments are a folder and the cases (stage,precision).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import nn

# Precision bf16_fp32: bf16 weights with float32 accumulation, which under ZeRO 1 is another class of DeepSpeed's.
CASES = {
    1: ["0,fp32", "1,fp32", "3,fp32"],
    2: ["0,fp32", "0,bf16", "1,fp32", "1,bf16_fp32", "2,fp32", "2,bf16", "3,fp32", "3,bf16"],
}
BATCH = 8
BEFORE, AFTER = 3, 3  # steps before and after the checkpoint


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(13, 29), nn.SiLU(), nn.Linear(29, 7), nn.SiLU(), nn.Linear(7, 5))


def client(model: nn.Module) -> AdamWEMA:
    first, *rest = model.parameters()
    groups = [{"params": [first]}, {"params": rest, "weight_decay": 0.0}]
    return AdamWEMA(groups, lr=1e-2, weight_decay=0.1, ema=Ema("warmup", 0.9))


def loss_of(model: Any, step: int, rank: int, world: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 13, generator=generator).chunk(world)[rank]
    y = torch.randn(BATCH, 5, generator=generator).chunk(world)[rank]
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


class Training:
    """One DeepSpeed engine around the network and our optimizer."""

    def __init__(self, stage: int, precision: str, rank: int, world: int) -> None:
        import deepspeed

        self.stage, self.rank, self.world = stage, rank, world
        model = network()
        self.optimizer = client(model)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": precision != "fp32"},
            "steps_per_print": 2**31,
        }
        if precision == "bf16_fp32":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        if (
            stage == 0 and precision == "bf16"
        ):  # its wrapper has just made a step with zero gradients
            self.engine.optimizer.refresh_fp32_params()
            self.optimizer.reset()

    def run(self, steps: range, poison: bool = False) -> None:
        for step in steps:
            loss = loss_of(self.engine, step, self.rank, self.world)
            if poison and self.rank == self.world - 1:
                loss = loss * float("nan")
            self.engine.backward(loss)
            self.engine.step()

    def state(self) -> list[dict]:
        states = self.optimizer.state.values()
        return [{k: torch.as_tensor(v).clone() for k, v in state.items()} for state in states]

    def ema(self) -> list[torch.Tensor]:
        """The EMA of every parameter, whole, on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        wrapper = self.engine.optimizer
        params = list(self.engine.module.parameters())
        if self.stage == 0:
            master = {id(param): param for param in params}
            if wrapper is not self.optimizer:
                for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                    master |= {id(low): high for low, high in zip(lows, highs, strict=True)}
            return [self.optimizer.state[master[id(param)]]["ema"].clone() for param in params]
        if self.stage < 3:  # DeepSpeed links only the first group's state, and none after a load
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()
        found = [safe_get_full_optimizer_state(param, "ema") for param in params]
        assert all(isinstance(each, torch.Tensor) for each in found)
        return [each for each in found if each is not None]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def same(one: list[dict], other: list[dict]) -> bool:
    """Whether two states are the same bits.

    Bits, not values: ZeRO 3 pads the last rank's share of a parameter of odd size with memory that nobody has
    written, which now and then holds a NaN, and a NaN is not equal to itself.
    """
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def train(case: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    stage, precision = case.split(",")
    first = Training(int(stage), precision, rank, world)
    first.run(range(BEFORE))
    before = first.state()
    first.run(range(BEFORE, BEFORE + 1), poison=True)
    unmoved = same(before, first.state())
    first.engine.save_checkpoint(str(folder / case), tag="saved")
    first.run(range(BEFORE, BEFORE + AFTER))
    second = Training(int(stage), precision, rank, world)
    path, _ = second.engine.load_checkpoint(str(folder / case), tag="saved")
    restored = path is not None and same(before, second.state())
    loaded_ema = second.ema()
    second.run(range(BEFORE, BEFORE + AFTER))
    ema = first.ema()
    return {
        "unmoved": unmoved,
        "restored": restored,
        "resumed": same(first.state(), second.state()),
        "has_moments": {"exp_avg", "exp_avg_sq", "ema", "step"} == set(before[0]),
        "ema_after_load": all(torch.isfinite(each).all() for each in loaded_ema),
        "ema_resumed": all(torch.equal(a, b) for a, b in zip(ema, second.ema(), strict=True)),
        "counted": all(state["step"].item() == BEFORE + AFTER for state in first.state()),
        "ema": ema,
    }


def process(folder: Path, cases: list[str]) -> None:
    import logging

    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Otherwise DeepSpeed first compiles a shared-memory all-reduce; gloo does the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.save({case: train(case, rank, world, folder) for case in cases}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> dict[int, list[dict]]:
    """World size -> per rank: case -> what `train` found."""
    found = {}
    for world, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"world{world}")
        run_ranks(__file__, folder, world, cases)
        found[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return found


def plain_ema() -> list[torch.Tensor]:
    """The same training with torch's own optimizer and a lerp."""
    model = network()
    first, *rest = model.parameters()
    groups = [{"params": [first]}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    averages = [param.detach().clone() for param in model.parameters()]
    for step in range(BEFORE + AFTER):
        adamw.zero_grad()
        loss_of(model, step, 0, 1).backward()
        adamw.step()
        t = step + 1
        for average, param in zip(averages, model.parameters(), strict=True):
            average.lerp_(param.detach(), 1.0 - min(0.9, t / (9.0 + t)))
    return averages


@pytest.mark.parametrize("world,case", [(w, case) for w, cases in CASES.items() for case in cases])
def test_under_zero(results: dict[int, list[dict]], world: int, case: str) -> None:
    """Nothing moves on a NaN of one rank; save, load and resume are bit-exact; the EMA is that of plain torch."""
    for rank in range(world):
        result = results[world][rank][case]
        assert all(value for key, value in result.items() if key != "ema"), (rank, result)
        for got, other in zip(result["ema"], results[world][0][case]["ema"], strict=True):
            assert torch.equal(got, other)
    tolerance = 2e-6 if case.endswith("fp32") and "bf16" not in case else 2e-2
    for got, want in zip(results[world][0][case]["ema"], plain_ema(), strict=True):
        torch.testing.assert_close(got.view_as(want), want, rtol=tolerance, atol=tolerance)


def test_stages_agree_to_the_bit(results: dict[int, list[dict]]) -> None:
    for world in CASES:
        whole = results[world][0]["0,fp32"]["ema"]
        for case in ("1,fp32", "3,fp32"):
            for got, want in zip(results[world][0][case]["ema"], whole, strict=True):
                assert torch.equal(got, want), (world, case)


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # as train.py does, and for its reason
