"""The state of training goes from any engine, ZeRO stage and number of processes to any other, bit for bit.

Run as a script, this file is one of the processes: arguments are a folder and a phase. In the first two processes train
every source and save it; in the second one process loads each into the next target and saves it from there; in the
third two processes load that into the target after.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speed_engine import engines
from speed_engine.distributed import Processes, start, stop
from speed_engine.engines import deepspeed_parts, optimizer
from speed_engine.engines.deepspeed import Config, DeepSpeedEngine
from speed_engine.engines.torch import Config as TorchConfig
from speed_engine.engines.torch import TorchEngine

BATCH, STEPS = 8, 3
KINDS = ("torch", "0", "1", "2", "3")
RINGS = {"fp32": KINDS, "bf16": (*KINDS, "1 in float32")}  # another class of DeepSpeed's


class Timeless(nn.Sequential):
    """Layers in a row, one of them frozen, which are told the time and do not mind it."""

    def forward(self, input: Tensor, time_B: Tensor | None = None) -> Tensor:
        return super().forward(input)


def network(seed: int) -> Timeless:
    torch.manual_seed(seed)
    layers = nn.Linear(13, 29), nn.SiLU(), nn.Linear(29, 7), nn.SiLU(), nn.Linear(7, 5)
    layers[2].bias.requires_grad_(False)
    layers[4].register_buffer("shift", torch.randn(3))
    return Timeless(*layers)


def engine_of(kind: str, precision: str, seed: int, processes: Processes, folder: Path) -> Any:
    sizes: dict[str, Any] = {
        "micro_batch": BATCH // processes.world,
        "accumulation": 1,
        "backend": "auto",
    }
    optim = optimizer.Config(lr=0.02, ema_kind="power", ema_sigma_rel=(0.05, 0.1), weight_decay=0.1)
    if kind == "torch":
        config: Any = TorchConfig(precision=precision)  # pyright: ignore[reportArgumentType]
        return TorchEngine(config, network(seed), optim, processes, **sizes)
    more = {"stage3_param_persistence_threshold": 0} if kind == "3" else {}
    settings: dict[str, Any] = {"zero_optimization": more}
    if "float32" in kind:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    path = folder / f"{os.getpid()}.json"
    path.write_text(json.dumps(settings))
    config = Config(zero=int(kind[0]), precision=precision, json_file=str(path))  # pyright: ignore[reportArgumentType]
    return DeepSpeedEngine(config, network(seed), optim, processes, **sizes)


def train(engine: Any, steps: range, processes: Processes) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        x, y = (torch.randn(BATCH, width, generator=generator) for width in (13, 5))
        x, y = (each.chunk(processes.world)[processes.rank] for each in (x, y))
        x = x.to(engine.compute_dtype)
        engine.backward((engine.forward(x, x[:, 0]).float() - y).square().mean())
        engine.step(0.02)


def whole(engine: Any, kind: str) -> dict[str, Tensor]:
    """All that an engine keeps, assembled by its own means (DeepSpeed's where that has cut it). Collective."""
    found = {f"model {k}": v for k, v in (engine.weights(ema=False) or {}).items()}
    found |= {f"ema {k}": v for k, v in (engine.weights(ema=True) or {}).items()}
    keys = ("exp_avg", "exp_avg_sq", "ema2")
    if kind[0] in "123":
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, p in engine.engine.module.named_parameters():
            if p.requires_grad:
                found |= {f"{key} {name}": safe_get_full_optimizer_state(p, key) for key in keys}
    else:
        parts = engine.masters.parts() if kind == "torch" else engine._parts()
        for part in parts:
            state = engine.optimizer.state[part.holder]
            found |= {f"{key} {part.name}": state[key] for key in keys}
    steps = {float(state["step"]) for state in engine.optimizer.state.values()}
    found["steps"] = torch.tensor(sorted(steps))
    return {key: value.detach().clone() for key, value in found.items()}


def lowered(engine: Any) -> dict[str, Tensor]:
    """The weights that the network computes with: what it answers."""
    x = torch.linspace(-1, 1, 26).view(2, 13).to(engine.compute_dtype)
    with torch.no_grad():
        return {"answer": engine.forward(x, x[:, 0]).float()}


def save(engine: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    engines.write(engine.state(folder), folder)


def theirs(processes: Processes, folder: Path) -> list[dict[str, Tensor]]:
    """DeepSpeed's own files, as earlier versions wrote them: before and after."""
    one, other = (engine_of("1", "bf16", seed, processes, folder) for seed in (1, 2))
    train(one, range(STEPS), processes)
    fits, deepspeed_parts.fits = deepspeed_parts.fits, lambda settings: False
    save(one, folder / "own")
    deepspeed_parts.fits = fits
    processes.barrier()
    other.load(folder / "own")
    return [whole(each, "1") for each in (one, other)]


def process(folder: Path, phase: int) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    processes, found = start("cpu"), {}
    for precision, ring in RINGS.items():
        for source, kind in enumerate(ring):
            here, there = (folder / f"{precision} {source} {n}" for n in (phase - 1, phase))
            if phase == 0:
                engine = engine_of(kind, precision, 1, processes, folder)
                train(engine, range(STEPS), processes)
                save(engine, there)
                found[there.name] = whole(engine, kind) | lowered(engine)
                here = there
            targets = [
                ring[(source + phase) % len(ring)],
                *([kind] if phase == 2 and kind in "13" else []),
            ]
            for again in targets:
                engine = engine_of(again, precision, 2, processes, folder)
                processes.barrier()
                engine.load(here)
                found[f"{here.name} in {again}"] = whole(engine, again) | lowered(engine)
                if phase == 1:
                    save(engine, there)
                train(engine, range(STEPS, STEPS + 1), processes)  # it goes on
    if phase == 0:
        found["own"], found["own again"] = theirs(processes, folder)
    torch.save(found, folder / f"found {phase} {processes.rank}.pt")
    stop(together=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks) -> dict[str, dict[str, Tensor]]:
    """What each engine of each phase held, on its first process."""
    folder, found = tmp_path_factory.mktemp("shards"), {}
    for phase, world in enumerate((2, 1, 2)):
        run_ranks(__file__, folder, world, [str(phase)])
        found |= torch.load(folder / f"found {phase} 0.pt")
    return found


@pytest.mark.parametrize("precision", RINGS)
def test_every_element_arrives(found, precision):
    """From two processes to one and to two, through three engines; the same engine among them."""
    ring, loads = RINGS[precision], 0
    for source in range(len(ring)):
        saved = found[f"{precision} {source} 0"]
        assert saved["steps"].tolist() == [STEPS] and "frozen" not in saved
        assert any(key.startswith("ema2") and value.any() for key, value in saved.items())
        loaded = {
            key: value
            for key, value in found.items()
            if key.startswith(f"{precision} {source} ") and " in " in key
        }
        loads += len(loaded)
        for how, values in loaded.items():
            assert values.keys() == saved.keys(), how
            different = [
                key
                for key, value in values.items()
                if not torch.equal(value.view(-1), saved[key].view(-1)) and key != "answer"
            ]
            assert not different, how
            torch.testing.assert_close(
                values["answer"],
                saved["answer"],
                rtol=0,
                atol=1e-6 if precision == "fp32" else 2e-2,
            )
    assert loads == 3 * len(ring) + 2


def test_files_of_deepspeed_are_read(found):
    """Of all but what is frozen, which they did not hold."""
    one, other = (
        {k: v for k, v in found[n].items() if "2.bias" not in k and "shift" not in k}
        for n in ("own", "own again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_where_deepspeed_keeps_its_own_files():
    def settings(**zero: Any) -> dict[str, Any]:
        return {"zero_optimization": {"stage": 3, **zero}}

    assert deepspeed_parts.fits(settings(offload_optimizer={"device": "cpu"}))
    assert not deepspeed_parts.fits(settings(offload_optimizer={"device": "nvme"}))
    assert not deepspeed_parts.fits(settings(offload_param={"device": "nvme"}))
    assert not deepspeed_parts.fits(settings(zero_hpz_partition_size=2))
    assert not deepspeed_parts.fits(settings(mics_shard_size=2))


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as train.py does, and for its reason
