"""The whole feed on one core, at ImageNet's size: the order of the samples, reading, checking, decoding, labels dropped
for guidance, the way to the device; 4x32x32 float16 latents from ordinary tars, in batches of 256.

`ours` is the trainer's `Loader`, thread and all; `ours-resident` the same with the set in memory (a part of it where it
does not fit). They give batches in a global random order; webdataset reads in the order of the files, litdata and
MosaicML shuffle their own copies of a part of the set. Every call reads the next batches, as training does.

BENCH_FEED_SAMPLES: size of the set (default 1,281,167; 13 GB on disk). BENCH_FEED_FOLDER: where sets are kept between
runs; without it they are made in pytest's own temporary folder.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions, version
from benchmarks.harness.measure import Case, GateError, Measured, Provider, Settings, measure
from benchmarks.ops.feed import rivals
from benchmarks.ops.feed.tars import SHAPE, bank, labels_of, latents_of, number_of, write_set
from speed_engine.conditions import label
from speed_engine.data import resident
from speed_engine.data.loader import Loader
from speed_engine.data.shards import Shards
from speed_engine.distributed import Processes

pytestmark = pytest.mark.timeout(3600)

PROVIDERS = ("webdataset", "litdata", "mosaicml", "ours-resident", "ours")
BATCH, PART = 256, 20480
NULL = 1000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """(samples in the set, batches of one call)."""
    quick = settings_of(metafunc.config).quick
    num = int(os.environ.get("BENCH_FEED_SAMPLES", 4096 if quick else 1_281_167))
    sizes = [(num, 2 if quick else 40)]
    metafunc.parametrize("measured", sizes, indirect=True, scope="module", ids=[f"latents32-{num}"])
    metafunc.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one core
    try:
        num, batches = request.param
        kept = os.environ.get("BENCH_FEED_FOLDER")
        folder = Path(kept) if kept else tmp_path_factory.mktemp("feed")
        yield measure_set(num, batches, folder, settings)
    finally:
        torch.set_num_threads(threads)


def test_feed(measured: Measured, provider: str, publish: Callable[[Measured, str], None]) -> None:
    publish(measured, provider)


def measure_set(num: int, batches: int, folder: Path, settings: Settings) -> Measured:
    """All loaders of one set."""
    tars, part = folder / f"tars-{num}", min(num, PART)
    if not (tars / "index.json").exists():
        write_set(tars, num, shard_size=min(10_000, num // 2))
    feeds = {
        "webdataset": lambda: Feed("webdataset", lambda: rivals.webdataset(tars, BATCH), settings),
        "litdata": lambda: Feed(
            "litdata", lambda: rivals.litdata(folder / f"litdata-{part}", part, BATCH), settings
        ),
        "mosaicml": lambda: Feed(
            "mosaicml-streaming",
            lambda: rivals.mosaicml(folder / f"mosaicml-{part}", part, BATCH),
            settings,
        ),
        "ours-resident": lambda: Ours(tars, settings, wanted=True),
        "ours": lambda: Ours(tars, settings, wanted=False),
    }
    case = Case(
        op="feed",
        name=f"latents32-{num}",
        shape="x".join(map(str, SHAPE)),
        dtype="float16 stored",
        num_bytes=batches * BATCH * 3 * 8192,  # read two bytes an element, write four
        samples=batches * BATCH,
    )
    made: dict[str, Feed] = {}

    def builder(name: str, make: Callable[[], Feed]) -> Callable[[], Provider]:
        def build() -> Provider:
            feed = made[name] = make()
            return Provider(feed.gate, lambda: feed.read(batches), facts=feed.facts)

        return build

    builders = {name: builder(name, make) for name, make in feeds.items()}
    measured = measure(case, builders, settings, conditions(settings.device))
    for name, feed in made.items():
        if name in measured.times:  # the last calls are the timed ones
            seconds = feed.cpu_seconds[-len(measured.times[name]) :]
            measured.facts[name]["samples_per_cpu_s"] = case.samples / statistics.median(seconds)
            measured.facts[name]["samples_per_cpu_s_best"] = case.samples / min(seconds)
    return measured


class Feed:
    """An endless row of batches, whose processor time is taken, all threads together."""

    def __init__(
        self,
        package: str,
        batches: Callable[[], rivals.Batches],
        settings: Settings,
        opened: float = 0.0,
    ):
        self.batches, self.device = batches, settings.device
        self.cpu_seconds: list[float] = []
        self.facts: dict[str, object] = {"version": version(package)} if package else {}
        before, begin = peak_bytes(), time.perf_counter()
        self._running = batches()
        self.first = next(self._running)
        self.facts["start_up_s"] = opened + time.perf_counter() - begin
        self.facts["start_up_bytes"] = peak_bytes() - before

    def read(self, num: int) -> None:
        """The next `num` batches, on the device."""
        begin = time.process_time()
        for _ in range(num):
            batch = next(self._running, None)
            if batch is None:  # the end of an epoch
                self._running = self.batches()
                batch = next(self._running)
            batch[0].to(self.device)
        self.cpu_seconds.append(time.process_time() - begin)

    def gate(self) -> None:
        """The first batches hold what was stored. Raises GateError."""
        for x, labels in (self.first, next(self._running)):
            check(x, labels)


class Ours(Feed):
    """The trainer's loader. Its own columns: resume in the middle of an epoch, memory a sample."""

    def __init__(self, tars: Path, settings: Settings, wanted: bool):
        begin = time.perf_counter()
        source = Shards(tars, check_scale=False)  # the numbers in the latents have no unit scale
        opened = time.perf_counter() - begin
        free = resident.free_bytes(settings.device)
        held = free // 3
        if settings.device.type == "cpu":  # half of what the page cache does not need for the tars
            on_disk = sum(tar.stat().st_size for tar in tars.glob("*.tar"))
            held = max(free // 16, (free - on_disk) // 2)
        if wanted and resident.predicted_bytes(source, False) > held:
            count = held // (resident.predicted_bytes(source, False) // len(source))
            source = Shards(tars, count=count, check_scale=False)
        here = Processes(0, 1, 0, settings.device)
        chosen = resident.choose(source, wanted, flip=False, device=here.device, world=1).source
        told = {"label": label.build(label.Config(), "label", source.facts.conditions["label"])}
        backend = "triton" if settings.device.type == "cuda" else "cpp"
        self.loader = Loader(chosen, told, 0, BATCH, BATCH, False, here, backend)
        super().__init__("", lambda: self.from_step(0), settings, opened)
        self.step, middle = 2, len(source) // BATCH // 2
        begin = time.perf_counter()
        later = self.from_step(middle)
        next(later)
        resumed = time.perf_counter() - begin
        later.close()
        self.facts |= {
            "resume_s": resumed,
            "samples_held": len(source),
            "index_bytes_per_sample": index_bytes(source) / len(source),
        }

    def read(self, num: int) -> None:
        """See Feed. All of the work lies within the call: the thread reads no batch of the next one."""
        begin = time.process_time()
        for batch in self.loader.batches(self.step, self.step + num):
            assert batch.x0.device == self.device
        self.step += num
        self.cpu_seconds.append(time.process_time() - begin)

    def gate(self) -> None:
        super().gate()
        if isinstance(self._running, Generator):
            self._running.close()  # and its thread ends

    def from_step(self, step: int) -> Generator[tuple[Tensor, Tensor]]:
        for batch in self.loader.batches(step, 10**6):
            yield batch.x0, batch.conditions["label"]


def index_bytes(source: Shards) -> int:
    """What the open set keeps in memory for its samples."""
    arrays = [value for value in vars(source).values() if hasattr(value, "nbytes")]
    return sum(array.nbytes for array in arrays)


def check(x: Tensor, labels: Tensor) -> None:
    """Raises GateError where a batch is not what its numbers say."""
    if x.dtype != torch.float32 or labels.dtype != torch.int64:
        raise GateError(f"batches are {x.dtype} and {labels.dtype}, not float32 and int64")
    host, number = x.cpu(), number_of(x.cpu().numpy())
    expected = torch.from_numpy(latents_of(number, bank())).float()
    kept = labels.cpu() != NULL
    right = torch.from_numpy(labels_of(number))
    if not torch.equal(host, expected) or not torch.equal(labels.cpu()[kept], right[kept]):
        raise GateError("a sample differs from what was written")
    if len(set(number.tolist())) < len(number) or kept.double().mean() < 0.8:
        raise GateError("samples come twice, or labels are gone")


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
