"""The loader's batches: what the definition of the order says, from files and from a resident set alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine.conditions import label
from speed_engine.data import Batch, Source, order, resident
from speed_engine.data.loader import SLOTS_AT_ONCE, Loader
from speed_engine.data.shards import Shards
from speed_engine.data.space import Space
from speed_engine.data.storage.writer import SetWriter
from speed_engine.distributed import Processes

NUM, SEED, CPU = 37, 11, torch.device("cpu")


@pytest.fixture(scope="module")
def posterior(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Latents with a posterior, mirrored ones and labels: all that a batch can hold."""
    folder, random = tmp_path_factory.mktemp("loader") / "set", np.random.default_rng(0)
    with SetWriter(folder, {"made": "test"}, shard_size=10, posterior=True) as writer:
        for number in range(NUM):
            x, mirrored = np.abs(random.standard_normal((2, 4, 4, 4))).astype(np.float16)
            writer.write(number + 1, x, number % 5, mirrored)
        writer.finish(scale=1.0, shift=0.0)
    return Shards(folder, check_scale=False)


def loader(
    source: Source, rank: int = 0, world: int = 1, micro: int = 8, flip: bool = True
) -> Loader:
    told = label.build(label.Config(dropout=0.4), "label", source.facts.conditions["label"])
    here = Processes(rank, world, rank, CPU)
    return Loader(source, {"label": told}, SEED, 16, micro, flip, here, "reference")


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.x0, batch.conditions["label"], batch.address


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        assert all(map(torch.equal, tensors(one), tensors(other)))


def test_a_batch_is_what_its_addresses_say(posterior: Shards):
    found = list(loader(posterior).batches(3, 5))
    for batch, (step, first) in zip(found, [(3, 0), (3, 8), (4, 0), (4, 8)], strict=True):
        assert batch.address.tolist() == [step, first]
        slot, here = np.arange(first, first + 8), np.array(step)
        chosen = order.sample_indices(SEED, here, slot, 16, NUM)
        stored, told = posterior.read(chosen, order.flips(SEED, here, slot))
        normals = order.posterior_normals(SEED, batch.address, (8, 2, 4, 4), "reference")
        assert torch.equal(batch.x0, posterior.decode(stored, normals))
        kept = batch.conditions["label"] != 5
        assert torch.equal(batch.conditions["label"][kept], told["label"][kept])


def test_blocks_of_steps_and_processes_leave_no_trace(posterior: Shards):
    """A start in the middle of a block, and two processes, give the batches of one run from the start."""
    steps = SLOTS_AT_ONCE // 16 + 2
    whole = list(loader(posterior, micro=16).addresses(0, steps))
    late = list(loader(posterior, micro=16).addresses(5, steps))
    parts = zip(*(loader(posterior, rank, 2).addresses(0, steps) for rank in (0, 1)), strict=True)
    for at, again in zip(whole[5:], late, strict=True):
        assert at.step == again.step and np.array_equal(at.indices, again.indices)
    for at, ranks in zip(whole, parts, strict=True):
        assert [each.first_slot for each in ranks] == [0, 8]
        assert np.array_equal(at.indices, np.concatenate([each.indices for each in ranks]))
        assert at.flips is not None
        assert at.flips.tolist() == [bool(f) for each in ranks for f in each.flips]  # pyright: ignore


@pytest.mark.parametrize("flip", [False, True])
def test_a_resident_set_gives_the_same_batches(
    posterior: Shards, flip: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resident, "CHUNK", 7)  # the last one is not full
    chosen = resident.choose(posterior, True, flip=flip, device=CPU, world=1)
    assert isinstance(chosen.source, resident.Resident) and "resident" in chosen.reason
    held = loader(chosen.source, flip=flip)
    assert_equal(list(held.batches(0, 6)), list(loader(posterior, flip=flip).batches(0, 6)))
    x, told = chosen.source._held or (torch.empty(0), {})
    assert x.nbytes + told["label"].nbytes == resident.predicted_bytes(posterior, flip)


def test_what_does_not_fit_is_refused_with_its_size(
    posterior: Shards, monkeypatch: pytest.MonkeyPatch
):
    needed = NUM * (2 * 4 * 4 * 4 * 2 + 8)
    assert resident.predicted_bytes(posterior, True) == needed
    assert resident.free_bytes(CPU) > 2**20
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed - 1)
    auto = resident.choose(posterior, "auto", flip=True, device=CPU, world=1)
    assert auto.source is posterior and "9.77e-06 GB" in auto.reason
    with pytest.raises(
        ValueError, match=r"train.resident=true: .* 1.95e-05 GB.* set train.resident"
    ):
        resident.choose(posterior, True, flip=True, device=CPU, world=2)  # two copies in one memory
    monkeypatch.setattr(resident, "free_bytes", lambda device: resident.AUTO_SHARE * needed)
    auto = resident.choose(posterior, "auto", flip=True, device=CPU, world=1)
    assert isinstance(auto.source, resident.Resident)
    assert resident.choose(posterior, False, flip=True, device=CPU, world=1).source is posterior


def test_an_error_of_the_reading_thread_reaches_the_step(posterior: Shards):
    class Broken(resident.Resident):
        def _load(self) -> tuple[Tensor, dict[str, Tensor]]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(loader(Broken(posterior, True, CPU)).batches(0, 1))


# ------------------------------------------------------------------ latents in bf16


@pytest.mark.parametrize("scale, shift", [(0.18215, 0.0), ((0.5, 2.0), (0.25, -3.0))])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("stored_dtype", [torch.float16, torch.float32])
def test_latents_are_rounded_once_and_never_copied_in_float32(scale, shift, drawn, stored_dtype):
    """To what float32 gives, but for its own last bits; the only float32 of the batch's size is a posterior's draw."""
    columns = [each if isinstance(each, tuple) else (each,) * 2 for each in (scale, shift)]
    space = Space("latents", *columns, posterior=drawn)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(5, 2 + 2 * drawn, 3, 7, generator=generator).to(stored_dtype)
    normals = torch.randn(5, 2, 3, 7, generator=generator) if drawn else None
    made = []

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {each.data_ptr() for each in args if isinstance(each, Tensor)}
            if isinstance(out, Tensor) and out.data_ptr() not in inputs and out.numel() >= 210:
                made.append(out.dtype)
            return out

    with Written():
        found = space.to_model(stored, normals, torch.bfloat16)
    assert made.count(torch.float32) == drawn and found.dtype == torch.bfloat16
    wanted = space.to_model(stored, normals)
    error = (found.double() - wanted.double()).abs()
    size = max(abs(s) * (stored.abs().max() * 8 + abs(d)) for s, d in zip(*columns, strict=True))
    assert (error <= 2.0**-8 * wanted.abs() + 2.0**-22 * size).all()
    assert (found == wanted.bfloat16()).double().mean() > 0.98


def test_a_batch_in_bf16_is_the_float32_one_rounded(posterior: Shards):
    plain, rounded = loader(posterior), replace(loader(posterior), dtype=torch.bfloat16)
    for wanted, found in zip(plain.batches(0, 2), rounded.batches(0, 2), strict=True):
        assert torch.equal(found.x0, wanted.x0.bfloat16())  # a scale of one: no bit is in doubt
        assert all(map(torch.equal, tensors(found)[1:], tensors(wanted)[1:]))


def test_what_cannot_be_in_bf16_is_refused(posterior: Shards):
    class Old:
        facts = posterior.facts

        def __len__(self) -> int:
            return NUM

        def decode(self, stored, normals=None):
            raise AssertionError

    with pytest.raises(ValueError, match=r"train\.latents=bf16, but Old\.decode takes no dtype"):
        replace(loader(posterior), source=Old(), dtype=torch.bfloat16)
    Old.facts = replace(posterior.facts, space=Space.pixels(2))
    with pytest.raises(ValueError, match="for latents, and the data are pixels"):
        replace(loader(posterior), source=Old(), dtype=torch.bfloat16)
