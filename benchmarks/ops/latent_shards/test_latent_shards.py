"""Reading latents from WebDataset tars on one core: our shard reader against stock webdataset, the same files.

Every reader makes the same batches: float32 latents [B, 4, 32, 32] and int64 labels, files in the page cache. Ours
reads the whole set in a global random order, the stock readers in the files' order, which is the easier task. Ours
checks a sample's CRC32 when it is read for the first time; the gate has done that before the timing begins.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import Case, GateError, Measured, Provider, Settings, measure

pytestmark = pytest.mark.timeout(1800)

PROVIDERS = ("webdataset-decode", "webdataset-raw", "ours")
SHAPE, BATCH, SHARD_SIZE = (4, 32, 32), 256, 2560
Batches = Iterator[tuple[Tensor, Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """(samples in the set, samples read by one call)."""
    quick = settings_of(metafunc.config).quick
    sizes = [(1024, 512)] if quick else [(20480, 5120)]
    names = [f"latents32-{num}" for num, _ in sizes]
    metafunc.parametrize("measured", sizes, indirect=True, scope="module", ids=names)
    metafunc.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    if settings.device.type != "cpu":
        pytest.skip("the loader is measured on the CPU; give --device cpu")
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one core
    try:
        num_stored, num_read = request.param
        folder = tmp_path_factory.mktemp("shards") / "set"
        yield measure_set(num_stored, num_read, folder, settings)
    finally:
        torch.set_num_threads(threads)


def test_latent_shards(
    measured: Measured, provider: str, publish: Callable[[Measured, str], None]
) -> None:
    publish(measured, provider)


def measure_set(num_stored: int, num_read: int, folder: Path, settings: Settings) -> Measured:
    """All readers of one set."""
    latents, labels = write_set(folder, num_stored)
    sample_bytes = latents[0].nbytes
    case = Case(
        op="latent_shards",
        name=f"latents32-{num_stored}",
        shape="x".join(map(str, SHAPE)),
        dtype="float16 stored",
        num_bytes=num_read * 3 * sample_bytes,  # read two bytes an element, write four
        samples=num_read,
    )

    def provider(name: str, batches: Callable[[], Batches]) -> Provider:
        def call() -> int:
            return sum(
                len(labels_B) for _, labels_B in itertools.islice(batches(), num_read // BATCH)
            )

        def gate() -> None:
            check(batches(), latents, labels, in_order=name != "ours")

        return Provider(gate, call)

    builders: dict[str, Callable[[], Provider]] = {
        "webdataset-decode": lambda: provider("webdataset-decode", decoding(folder)),
        "webdataset-raw": lambda: provider("webdataset-raw", raw(folder)),
        "ours": lambda: provider("ours", ours(folder)),
    }
    return measure(case, builders, settings, conditions(settings.device))


def write_set(folder: Path, num: int) -> tuple[np.ndarray, np.ndarray]:
    """An ordinary set of .npy latents in tars. The first element of a latent is its index, for the gate."""
    from speed_engine.data.storage.writer import SetWriter

    generator = np.random.default_rng(0)
    latents = generator.standard_normal((num, *SHAPE), dtype=np.float32).astype(np.float16)
    latents[:, 0, 0, 0], latents[:, 0, 0, 1] = np.divmod(np.arange(num), 1024)
    labels = generator.integers(0, 1000, num)
    with SetWriter(folder, {"made": "benchmark"}, shard_size=SHARD_SIZE) as writer:
        for index in range(num):
            writer.write(index + 1, latents[index], int(labels[index]))
        writer.finish(scale=1.0, shift=0.0)
    return latents, labels


def check(batches: Batches, latents: np.ndarray, labels: np.ndarray, in_order: bool) -> None:
    """One pass over the set gives every sample once, with its label. Raises GateError."""
    seen: list[Tensor] = []
    for x_BCHW, labels_B in batches:
        if x_BCHW.dtype != torch.float32 or labels_B.dtype != torch.int64:
            raise GateError(
                f"batches are {x_BCHW.dtype} and {labels_B.dtype}, not float32 and int64"
            )
        index_B = (x_BCHW[:, 0, 0, 0] * 1024 + x_BCHW[:, 0, 0, 1]).long()
        expected = torch.from_numpy(latents[index_B.numpy()]).float()
        if not torch.equal(x_BCHW, expected) or not np.array_equal(labels_B, labels[index_B]):
            raise GateError("a sample differs from what was written")
        seen.append(index_B)
    order = torch.cat(seen)
    everything = torch.arange(len(latents))
    if not torch.equal(order if in_order else order.sort().values, everything):
        raise GateError(f"{len(order)} samples came back for {len(latents)}")
    if not in_order and torch.equal(order, everything):
        raise GateError("the samples are not shuffled")


# ------------------------------------------------------------------ the readers


def stock(folder: Path) -> Any:
    """webdataset over the tars, in order, no worker processes."""
    from webdataset.compat import WebDataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return WebDataset(shards, shardshuffle=False)


def decoding(folder: Path) -> Callable[[], Batches]:
    """`.decode()` and `.to_tuple()`: what webdataset's manual shows."""

    def batches() -> Batches:
        samples = stock(folder).decode().to_tuple("npy", "cls")
        for group in grouped(samples):
            latents, labels = zip(*group, strict=True)
            yield torch.from_numpy(np.stack(latents)).float(), torch.tensor(labels)

    return batches


def raw(folder: Path) -> Callable[[], Batches]:
    """No decoder: the members' bytes, the array behind its header by `frombuffer`."""

    def batches() -> Batches:
        header = 0
        for group in grouped(stock(folder)):
            header = header or header_size(group[0]["npy"])
            arrays = [np.frombuffer(sample["npy"], np.float16, offset=header) for sample in group]
            labels = [int(sample["cls"]) for sample in group]
            latents = torch.from_numpy(np.stack(arrays)).view(-1, *SHAPE)
            yield latents.float(), torch.tensor(labels)

    return batches


def ours(folder: Path) -> Callable[[], Batches]:
    """The shard reader, in a new random order of the whole set in every pass."""
    from speed_engine.data.shards import Shards

    source = Shards(
        folder, check_scale=False
    )  # the gate's indices in the latents have no unit scale
    generator = torch.Generator().manual_seed(0)

    def batches() -> Batches:
        for chosen in torch.randperm(len(source), generator=generator).split(BATCH):
            stored, told = source.read(chosen)
            yield source.decode(stored), told["label"]

    return batches


def grouped(samples: Any) -> Iterator[list[Any]]:
    """Lists of BATCH samples."""
    iterator = iter(samples)
    while group := list(itertools.islice(iterator, BATCH)):
        yield group


def header_size(member: bytes) -> int:
    """Bytes before the array in an .npy member."""
    stream = io.BytesIO(member)
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
    return stream.tell()
