"""ImageNet-sized sets of latents in ordinary tars, one .npy and one .cls a sample, in a minute instead of an hour.

All samples have one size, so a shard is one array of bytes: names, labels, latents and checksums are filled in for all
samples at once. The first and the last shard are read by the engine's own scan, which refuses what is no such tar; the
entries of the others follow from the first one's.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np

from speed_engine.data.storage import index as index_file
from speed_engine.data.storage.scan import entries_path

SHAPE, CLASSES, BANK = (4, 32, 32), 1000, 2048
REGION, NPY, CLS = (
    10240,
    512 + 128,
    512 + 8704 + 512,
)  # bytes of a sample; where array and label lie in it
HEADERS = (0, 512 + 8704)
END = bytes(1024)


def labels_of(number: np.ndarray) -> np.ndarray:
    """The class of each sample."""
    return number * 7919 % CLASSES


def bank() -> np.ndarray:
    """The latents that the samples repeat, float16 [BANK, *SHAPE]."""
    random = np.random.default_rng(0)
    return random.standard_normal((BANK, *SHAPE), dtype=np.float32).astype(np.float16)


def latents_of(number: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """The samples as they are stored. The first two elements tell the number, for the gates."""
    x = latents[number % BANK]
    x[:, 0, 0, 0], x[:, 0, 0, 1] = np.divmod(number, 1024)
    return x


def number_of(x: np.ndarray) -> np.ndarray:
    """The inverse: int64 [B] from float [B, *SHAPE]."""
    return (x[:, 0, 0, 0].astype(np.int64) * 1024) + x[:, 0, 0, 1].astype(np.int64)


def write_set(folder: Path, num: int, shard_size: int) -> None:
    """`num` samples in tars of `shard_size`, and their index; scale 1."""
    folder.mkdir(parents=True)
    template, latents = _template(), bank()
    scanned, first = [], None
    starts = range(0, num, shard_size)
    for shard, start in enumerate(starts):
        path = folder / f"shard-{shard:06d}.tar"
        number = np.arange(start, min(start + shard_size, num))
        content = _shard(number, template, latents)
        with open(path, "wb") as file:
            file.write(content.tobytes())
            file.write(END)
        if first is None or start == starts[-1]:
            scanned.append(index_file.index_shard(path))
            first = first or (scanned[0], np.load(entries_path(path)))
            continue
        summary, entries = first[0], first[1].copy()
        entries["label"] = labels_of(number)
        entries["crc32"] = [zlib.crc32(row) for row in content]
        stream = io.BytesIO()
        np.save(stream, entries, allow_pickle=False)
        entries_path(path).write_bytes(stream.getvalue())
        sums = hashlib.sha256(content.tobytes())
        sums.update(END)
        facts = {
            "name": path.name,
            "sha256": sums.hexdigest(),
            "entries_sha256": hashlib.sha256(stream.getvalue()).hexdigest(),
        }
        shard_facts = summary.shard.model_copy(update=facts)
        scanned.append(summary.model_copy(update={"shard": shard_facts}))
    index = index_file.compose(scanned, scale=1.0, shift=0.0, num_classes=CLASSES)
    index_file.save(index, folder)


def _template() -> np.ndarray:
    """The bytes of one sample."""
    array, stream = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(SHAPE, np.float16))
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (("000000000.npy", array.getvalue()), ("000000000.cls", b"000")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return np.frombuffer(stream.getvalue()[:REGION], np.uint8)


def _shard(number: np.ndarray, template: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """All samples of a shard: uint8 [M, REGION]."""
    content = np.tile(template, (len(number), 1))
    content[:, NPY : NPY + 8192] = (
        latents_of(number, latents).reshape(len(number), -1).view(np.uint8)
    )
    content[:, CLS : CLS + 3] = _digits(labels_of(number), 3, 10)
    for begin in HEADERS:
        header = content[:, begin : begin + 512]
        header[:, :9] = _digits(number, 9, 10)
        header[:, 148:156] = ord(" ")  # the sum is taken with blanks in its own place
        header[:, 148:154] = _digits(header.sum(1, dtype=np.int64), 6, 8)
        header[:, 154] = 0
    return content


def _digits(number: np.ndarray, width: int, base: int) -> np.ndarray:
    """Text of fixed width: uint8 [M, width]."""
    power = base ** np.arange(width - 1, -1, -1)
    return (number[:, None] // power % base + ord("0")).astype(np.uint8)
