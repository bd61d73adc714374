"""Shards of a set on the network, on this machine: fetched whole when needed, the least recently used given up.

    <cache>/<fingerprint>/index.json, shard-000000.idx.npy, shard-000000.tar ...

All processes of a machine share a cache: one fetches a shard while the others wait for it, and the bytes of all shards
in the cache stay below the bound. A shard appears under its name only when its size and SHA-256 are those of the index.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speed_engine.atomic_files import write_bytes

from .. import DataError
from . import index as index_file
from .fetch import Fetcher
from .index import INDEX
from .scan import entries_path

MOST_INDEX = 1 << 28  # bytes of an index.json
LEAST_ENTRY = 1 << 12  # bytes of an .idx.npy, and
PER_ENTRY = 1 << 11  # for each sample; a name takes 8
AT_A_TIME = 8  # shards that are fetched
TOUCH = 30.0  # seconds between two notes that a shard is in use


class _Open:
    """An open file, closed when nobody holds it any more: also a reader whose shard is given up meanwhile."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.touched = 0.0

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)


class CachedSet:
    """The set at `url` (its folder), whose shards come into `cache` as they are asked for. Raises DataError.

    most: bytes of all shards in the cache. folder: what is here of the set. index: all of index.json.
    """

    def __init__(self, url: str, cache: Path, most: int, fetcher: Fetcher) -> None:
        self.url = url.removesuffix(INDEX).rstrip("/")
        self.cache, self.most, self.fetcher = cache.expanduser(), most, fetcher
        if "?" in url:
            raise DataError(f"{url} has a question mark; give the address of the set's folder")
        if "@" in url.split("://", 1)[-1].split("/", 1)[0]:  # it would stand in every manifest
            raise DataError(
                "data.path holds a name or a password; give them by the store's own settings (environment, ~/.aws)"
            )
        content = fetcher.content(f"{self.url}/{INDEX}", MOST_INDEX)
        try:
            self.index = index_file.read(content, f"{self.url}/{INDEX}")
            largest = max(shard.bytes for shard in self.index.shards)
            if largest > most:
                raise DataError(
                    f"data.cache_bytes={most} is less than the largest shard of {self.url} has, {largest}; raise it"
                )
            self.folder = self.cache / self.index.fingerprint[:32]
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(f"{self.folder.name}.{INDEX}"):
                write_bytes(self.folder / INDEX, content)
                self._fetch_entries()
        except OSError as error:
            raise DataError(
                f"{self.cache} cannot be written ({error.strerror}); choose another data.cache"
            ) from None
        self._files: dict[int, _Open] = {}
        self._mutex = threading.Lock()

    @property
    def remark(self) -> str | None:
        """A sentence on what is still to come, and on a cache that is too small to be of use."""
        whole = sum(shard.bytes for shard in self.index.shards)
        if whole > self.most:
            return (
                f"data.cache_bytes={self.most} holds a part of {self.url} only, which has {whole} bytes; samples are "
                "read in random order over all shards, so most reads will fetch a whole shard: raise it where there is "
                "room"
            )
        coming = [shard.bytes for shard in self.index.shards if not self._here(shard.name)]
        if not coming:
            return None
        return (
            f"{len(coming)} shards of {self.url}, {sum(coming)} bytes, come into {self.cache} when they are first "
            "read, most of them in the first steps"
        )

    def _here(self, name: str) -> bool:
        return (self.folder / name).exists()

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[int]:
        """A descriptor of a shard, good inside the block. Raises DataError."""
        with self._mutex:
            opened = self._files.get(number)
        if opened is None:
            opened = self._opened(number)
            with self._mutex:
                self._files[number] = opened
                for other, each in list(self._files.items()):
                    if (
                        os.fstat(each.descriptor).st_nlink == 0
                    ):  # given up: its bytes go with the last reader
                        del self._files[other]
        now = time.monotonic()
        if now - opened.touched > TOUCH:
            opened.touched = now
            with contextlib.suppress(OSError):  # given up by another process: nothing to note
                os.utime(self._path(number))
        yield opened.descriptor

    def bring(self, numbers: list[int]) -> None:
        """Fetch what is missing of these shards, several at a time, where the cache has room for all of them."""
        with self._mutex:
            missing = [number for number in numbers if number not in self._files]
        needed = sum(self.index.shards[number].bytes for number in numbers)
        if len(missing) < 2 or needed > self.most:
            return
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            for _ in pool.map(self._bring, missing):
                pass

    def _bring(self, number: int) -> None:
        with self.file(number):
            pass

    def forget(self, number: int) -> None:
        """Give a shard up that is damaged on this machine: the next `file` fetches it again."""
        with self._mutex, self._locked("room"):
            self._files.pop(number, None)
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / self.index.shards[number].name

    def _fetch_entries(self) -> None:
        for shard in self.index.shards:
            path = entries_path(self.folder / shard.name)
            with contextlib.suppress(FileNotFoundError):
                if hashlib.sha256(path.read_bytes()).hexdigest() == shard.entries_sha256:
                    continue
            most = LEAST_ENTRY + PER_ENTRY * shard.count
            content = self.fetcher.content(f"{self.url}/{path.name}", most)
            if hashlib.sha256(content).hexdigest() != shard.entries_sha256:
                raise DataError(
                    f"{self.url}/{path.name} is damaged or belongs to another index; put the set there again"
                )
            write_bytes(path, content)

    def _opened(self, number: int) -> _Open:
        """The shard, fetched if it is not here."""
        shard, path = self.index.shards[number], self._path(number)
        with self._locked(f"{self.folder.name}.{shard.name}"):
            with self._locked("room"):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_size == shard.bytes:
                        os.utime(path)
                        return _Open(path)
                    path.unlink()
                partial = path.with_suffix(".tar.partial")
                partial.unlink(missing_ok=True)  # a killed process's
                self._make_room(shard.bytes)
                with open(partial, "wb") as file:
                    file.truncate(shard.bytes)  # from now on it counts
            try:
                self.fetcher.to_file(f"{self.url}/{shard.name}", partial, shard.bytes, shard.sha256)
                with self._locked("room"):
                    os.replace(partial, path)
                    return _Open(path)
            except OSError as error:
                raise DataError(
                    f"{partial} cannot be written ({error.strerror}); make room there, lower data.cache_bytes, or "
                    "choose another data.cache"
                ) from None
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Give up the least recently used shards, of any set in the cache, until `needed` bytes fit below the bound."""
        here = []
        for path in self.cache.glob("*/*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                here.append((status.st_mtime_ns, status.st_size, path))
        # What is being fetched cannot be given up; what a killed process left is nobody's.
        coming = 0
        for path in self.cache.glob("*/*.tar.partial"):
            if self._is_being_fetched(path):
                # By now it may be there whole, or have failed.
                with contextlib.suppress(FileNotFoundError):
                    coming += path.stat().st_size
            else:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in here) + coming
        for _, size, path in sorted(here):
            if total + needed <= self.most:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _is_being_fetched(self, partial: Path) -> bool:
        name = f"{partial.parent.name}.{partial.name.removesuffix('.partial')}"
        with open(self._lock_path(name), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _lock_path(self, name: str) -> Path:
        (self.cache / ".locks").mkdir(exist_ok=True)
        return self.cache / ".locks" / f"{name}.lock"  # of no ending that a shard has

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Held by one thread of one process of this machine at a time."""
        with open(self._lock_path(name), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
