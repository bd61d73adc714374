"""Kind `shards`: pixels or latents in WebDataset tars, read in any order through our index.

A sample is read by its byte position (`pread`, straight into the batch), not by walking the tar:
nothing is extracted, nothing is unpickled, and a file that shrinks under a running job is an error
text and not a bus error. The first time a sample is touched its CRC32 is checked; afterwards a
batch costs one read per sample and one conversion.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from speed_engine.conditions.label import described
from speed_engine.data.expected import Expected
from speed_engine.data.space import Space
from speed_engine.kinds import Section

from . import ArrayFacts, ConditionFacts, DataError, Facts
from .storage import index as index_file
from .storage.cache import CachedSet
from .storage.fetch import Fetcher, is_url
from .storage.npy import PREFIX, misfit
from .storage.rows import read_rows, slower
from .storage.sound import sound

TORCH_DTYPES = {
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Root mean square of scaled latents: 1 is right, 0.18 is "scaled twice", 5.5 is "never scaled".
RMS_RANGE = (0.3, 3.0)
CHANNEL_RMS = (0.5, 2.0)  # of one channel; outside it is told, not refused


class Config(Section):
    """A folder with `index.json` and its shards (`python -m speed_engine encode` makes one)."""

    kind: Literal["shards"] = "shards"
    path: str = Field(
        description="folder with index.json and the shards; or its address, https://..., s3://..."
    )
    check_scale: bool = Field(
        True, description="refuse latents whose measured size is far from 1 in model space"
    )
    retries: int = Field(3, ge=0, le=20, description="how often a failed read is tried again")
    cache: str = Field(
        "~/.cache/speed_engine/shards",
        description="folder of this machine for the shards of a path on the network, which its processes share",
    )
    cache_bytes: int = Field(
        100_000_000_000,
        ge=1,
        description="bytes of all shards in `cache`; the least recently used go first",
    )
    timeout: float = Field(
        30.0,
        gt=0,
        description="seconds without a byte from the network until a read is tried again",
    )
    expect: Expected | None = Field(
        None,
        description="shape and space that the samples must have, {shape: [C, H, W], space: KIND}",
    )
    skip_damaged: bool = Field(
        False,
        description="take the next sample in the place of one that is damaged, and say so; false: the run is saved "
        "and ends",
    )


def build(config: Config) -> Shards:
    """Open the set. Raises DataError."""
    cached = None
    if is_url(config.path):
        fetcher = Fetcher(config.timeout, config.retries)
        cached = CachedSet(config.path, Path(config.cache), config.cache_bytes, fetcher)
    folder = Path(config.path).expanduser() if cached is None else cached.folder
    if config.expect is not None:  # before the scale, which is another question with other data
        config.expect.check(
            facts_of(index_file.load(folder)), config.path if cached else str(folder)
        )
    return Shards(
        folder,
        cached=cached,
        check_scale=config.check_scale,
        retries=config.retries,
        skip_damaged=config.skip_damaged,
    )


class Shards:
    """Samples first to first + count - 1 of the set in `folder` (default: all); a data.Source.

    cached: where the shards come from that are not in `folder` yet; None: all are.
    Further attributes: index (all of index.json), mean and std (measured, per channel, in model
    space).
    """

    def __init__(
        self,
        folder: Path,
        *,
        cached: CachedSet | None = None,
        first: int = 0,
        count: int | None = None,
        check_scale: bool = True,
        retries: int = 3,
        skip_damaged: bool = False,
    ):
        self.folder, self.retries, self.skip_damaged = folder, retries, skip_damaged
        self.cached = cached
        self.instead: dict[int, int] = {}  # of a damaged sample, which one is read in its place
        self.index = index = index_file.load(folder)
        if check_scale:
            _check_scale(index, folder)
        self.first = first
        self.count = index.count - first if count is None else count
        if first < 0 or not (0 < self.count <= index.count - first):
            raise DataError(
                f"samples {first} to {first + self.count} do not exist: {folder} has {index.count}"
            )
        self.mean, self.std = index.mean, index.std
        self.facts = facts_of(index)
        odd = odd_channels(self.facts, self.mean, self.std)
        self.remarks = [] if odd is None else [f"{folder}: {odd}"]
        if cached is not None and cached.remark:
            self.remarks.append(cached.remark)
        if reason := slower():
            self.remarks.append(f"samples are read one by one from Python, more slowly: {reason}")
        whole = self.count == index.count
        self.fingerprint = (
            index.fingerprint if whole else f"{index.fingerprint}[{first}+{self.count}]"
        )
        here = cached is None
        tables = [index_file.load_entries(folder, index, shard, here) for shard in index.shards]
        entries = np.concatenate(tables)
        # 57 bytes a sample in memory, all in all.
        counts = [len(table) for table in tables]
        self._shard = np.repeat(np.arange(len(tables), dtype=np.int32), counts)
        self._base = np.cumsum([0] + [len(table) for table in tables])
        self._entries, self._columns = entries, index.columns
        self._offset = entries["offset"].copy()
        self._flipped = entries["flipped"].copy() if index.flipped else None
        self._label = np.maximum(entries["label"], 0).astype(np.int64)
        self._checked = np.zeros(len(entries), bool)
        try:
            self._files = [
                open(folder / shard.name, "rb", buffering=0)  # noqa: SIM115  open as long as the source
                for shard in index.shards
                if here
            ]
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be opened ({error.strerror}); with many shards raise "
                "`ulimit -n` or write larger ones"
            ) from None
        self._descriptor = np.array([file.fileno() for file in self._files])  # by shard

    def __len__(self) -> int:
        return self.count

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(stored [B, C', *space] in the stored dtype, the conditions' arrays by name), on the CPU.

        C' = 2C with a posterior. For a conversion on the device: move `stored` there and `decode`.
        """
        chosen = self._chosen(indices)
        flipped = None if flips is None else np.asarray(flips, bool)
        if flipped is not None and flipped.shape != chosen.shape:
            raise DataError(f"{len(chosen)} samples need as many flips, not {flipped.shape}")
        if self.cached is not None:
            self.cached.bring(np.unique(self._shard[chosen]).tolist())
        new = chosen[~self._checked[chosen]]
        if len(new) and self.cached is None and slower() is None:
            found = sound(self._columns, self._entries[new], self._descriptor[self._shard[new]])
            self._checked[new[found]] = True
        for sample in np.sort(chosen[~self._checked[chosen]]).tolist():  # shard by shard
            self._examine(sample)
        if self.instead:
            chosen = np.array([self.instead.get(each, each) for each in chosen.tolist()], np.int64)
        offset = self._offset[chosen]
        if flipped is not None and self.index.kind == "latents":
            if self._flipped is None:
                raise DataError(
                    f"{self.folder} holds no flipped latents; encode it again with --flip or turn "
                    "flips off"
                )
            offset = np.where(flipped, self._flipped[chosen], offset)
        stored = torch.empty(
            len(chosen), *self.index.stored_shape, dtype=TORCH_DTYPES[self.index.dtype]
        )
        self._fill(stored, chosen, offset, self.index.array_bytes)
        if flipped is not None and self.index.kind == "pixels":
            rows = torch.from_numpy(flipped)
            stored[rows] = stored[rows].flip(-1)
        return stored, self._told(chosen)

    def _examine(self, sample: int) -> None:
        """Check a sample before its first use. Raises DataError, or notes the next good one in its place."""
        if sample in self.instead:
            return
        with self._open(int(self._shard[sample])):  # a shard out of reach is not a damaged sample
            pass
        try:
            self._region(sample)
            return
        except DataError as error:
            if not self.skip_damaged:
                raise
            reason = error
        for step in range(1, self.count):
            other = self.first + (sample - self.first + step) % self.count
            with contextlib.suppress(DataError):
                self._region(other)
                self.instead[sample] = other
                text = f"{reason}; the next good sample is read in its place ({len(self.instead)} skipped)"
                print(f"WARNING: {text}", file=sys.stderr, flush=True)
                return
        raise DataError(f"no sample of {self.folder} can be read") from reason

    def _chosen(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """The samples' numbers in the whole set. Raises DataError for what is not an index."""
        chosen = np.asarray(indices) if len(indices) else np.zeros(0, np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise DataError(
                f"sample indices of {self.folder} must be integers in a row, not {chosen.tolist()}"
            )
        wrong = np.flatnonzero((chosen < 0) | (chosen >= self.count))
        if len(wrong):
            raise DataError(
                f"sample indices must lie in [0, {self.count}) of {self.folder}, and "
                f"{chosen[wrong[0]]} does not"
            )
        return chosen.astype(np.int64) + self.first

    def _told(self, chosen: np.ndarray) -> dict[str, Tensor]:
        """Label and named arrays of the samples, whose regions are checked already."""
        told: dict[str, Tensor] = {}
        if self.index.num_classes:
            told["label"] = torch.from_numpy(self._label[chosen])
        for name, array in self.index.arrays.items():
            values = torch.empty(len(chosen), *array.shape, dtype=TORCH_DTYPES[array.dtype])
            self._fill(values, chosen, self._entries[PREFIX + name][chosen], array.bytes)
            told[name] = values
        return told

    def decode(
        self, stored: Tensor, normals: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Stored values to model space, on the same device (`Space.to_model`)."""
        return self.facts.space.to_model(stored, normals, dtype)

    def _fill(self, stored: Tensor, chosen: np.ndarray, offset: np.ndarray, size: int) -> None:
        """One read per sample into its row. What fails goes through the slow and careful path."""
        rows = stored.view(torch.uint8).numpy().reshape(len(chosen), size)
        for row in self._read_rows(rows, self._shard[chosen], offset):
            sample = int(chosen[row])
            begin = int(offset[row]) - int(self._entries["start"][sample])
            region = self._region(sample)[begin : begin + size]
            rows[row] = np.frombuffer(region, np.uint8)

    def _read_rows(self, rows: np.ndarray, shard: np.ndarray, offset: np.ndarray) -> list[int]:
        """Fill the rows from their shards; those that could not be filled."""
        if self.cached is None:
            return read_rows(rows, self._descriptor[shard], offset)
        failed: list[int] = []
        for one in np.unique(shard).tolist():  # one at a time: a cache may have no room for two
            where = np.flatnonzero(shard == one)
            part = np.empty((len(where), rows.shape[1]), np.uint8)
            with self.cached.file(one) as descriptor:
                bad = read_rows(part, np.full(len(where), descriptor), offset[where])
            rows[where] = part
            failed += where[bad].tolist()
        return failed

    def _open(self, shard: int) -> AbstractContextManager[int]:
        """A descriptor of a shard."""
        if self.cached is not None:
            return self.cached.file(shard)
        return contextlib.nullcontext(int(self._descriptor[shard]))

    def _region(self, sample: int) -> bytes:
        """All bytes of a sample, CRC32 checked; a failed read is tried again. Raises DataError."""
        entry = self._entries[sample]
        start, length = int(entry["start"]), int(entry["length"])
        shard = int(self._shard[sample])
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.1 * 2 ** (attempt - 1), 5.0))
                if self.cached is not None:
                    self.cached.forget(shard)
            try:
                with self._open(shard) as descriptor:
                    region = os.pread(descriptor, length, start)
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
                continue
            if len(region) < length:
                reason = "the file ends before it (truncated)"
            elif zlib.crc32(region) != entry["crc32"]:
                reason = "damaged, its CRC32 does not fit"
            else:
                if fault := misfit(self._columns, self.index.ends(entry), region):
                    cure = f"rebuild the index with `{index_file.REINDEX}`"
                    raise DataError(f"{self._place(sample)}: {fault}; {cure}")
                self._checked[sample] = True
                return region
        raise DataError(
            f"{self._place(sample)}: {reason}; restore the shard (`python -m speed_engine encode "
            "--verify DIR` lists every fault)"
        )

    def _place(self, sample: int) -> str:
        shard = int(self._shard[sample])
        name = self.folder / self.index.shards[shard].name
        return f"{name}, sample {sample - self._base[shard]}"


def facts_of(index: index_file.Index) -> Facts:
    """What the index says, as models and manifests are told."""
    scale, shift = (
        each if isinstance(each, tuple) else (each,) * index.shape[0]
        for each in (index.scale, index.shift)
    )
    told = {}
    if index.num_classes:
        told["label"] = described(index.num_classes, index.class_names)
    arrays = {name: ArrayFacts(each.shape, each.dtype) for name, each in index.arrays.items()}
    for name, one in index.conditions.items():
        own = {array: arrays.pop(array) for array in one.arrays}
        told[name] = ConditionFacts(one.kind, own, details=one.details)
    for name, array in arrays.items():
        told[name] = ConditionFacts(index.arrays[name].kind, {name: array})
    space = Space(index.kind, scale, shift, index.posterior, index.vae)
    return Facts(index.shape, space, told, index.kind == "pixels" or index.flipped)


def _check_scale(index: index_file.Index, folder: Path) -> None:
    if index.kind != "latents":
        return
    rms = float(np.sqrt(np.mean(np.square(index.mean) + np.square(index.std))))
    if not RMS_RANGE[0] <= rms <= RMS_RANGE[1]:
        raise DataError(
            f"the latents of {folder} have a root mean square of {rms:.3g} in model space instead "
            f"of about 1, so their scale {np.mean(index.scale):.6g} is probably wrong; correct it with "
            f"`{index_file.REINDEX} --scale S`, or set data.check_scale=false"
        )


def odd_channels(facts: Facts, mean: Sequence[float], std: Sequence[float]) -> str | None:
    """One sentence where a channel of latents is far from unit scale, None where all is well.

    mean, std: measured, per channel, in model space.
    """
    rms = np.sqrt(np.square(mean) + np.square(std))
    far = np.flatnonzero((rms < CHANNEL_RMS[0]) | (rms > CHANNEL_RMS[1]))
    if facts.space.kind != "latents" or not len(far):
        return None
    which = ", ".join(f"{number} ({rms[number]:.2g})" for number in far[:4])
    more = f" and {len(far) - 4} more" if len(far) > 4 else ""
    return (
        f"the latents are not of unit scale: root mean square of channel {which}{more} instead of about 1; "
        f"`{index_file.REINDEX} --scale auto` sets every channel to mean 0 and deviation 1"
    )
