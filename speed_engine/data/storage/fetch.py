"""Files from HTTP servers and object stores: whole, in bounded time, or one sentence.

http and https are read with the standard library, every other scheme (s3, gs, az ...) through fsspec. A fetch that
stalls or breaks off is taken up where it stopped, as often as is allowed. This is the only file that imports fsspec.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_engine.atomic_files import sync

from .. import DataError

PIECE = 1 << 20  # bytes read at a time
LONGEST_WAIT = 10.0  # seconds between two attempts
FOR_GOOD = range(400, 500)  # answers that another attempt does not change, but for these
AGAIN = (408, 425, 429)


def is_url(path: str) -> bool:
    """Whether a data.path is a place on the network."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


class _Broken(Exception):
    """An attempt failed; the text says how. for_good: another one would, too."""

    def __init__(self, text: str, for_good: bool = False) -> None:
        super().__init__(text)
        self.for_good = for_good


@dataclass(frozen=True)
class Fetcher:
    """How files are fetched. timeout: seconds without a byte. retries: further attempts after the first."""

    timeout: float = 30.0
    retries: int = 5

    def content(self, url: str, most: int) -> bytes:
        """A small file of at most `most` bytes. Raises DataError."""
        found = bytearray()

        def attempt() -> None:
            found.clear()
            for _, piece in self._pieces(url, 0):
                found.extend(piece)
                if len(found) > most:
                    raise _Broken(f"it has more than {most} bytes", for_good=True)

        self._insist(url, attempt)
        return bytes(found)

    def to_file(self, url: str, path: Path, size: int, sha256: str) -> None:
        """Write the file of this size and sum to `path`, which is complete when this returns.

        Raises DataError, and OSError where `path` cannot be written.
        """
        done = 0

        def attempt() -> None:
            nonlocal done
            with open(path, "r+b") as file:
                for begin, piece in self._pieces(url, done):
                    if begin + len(piece) > size:
                        text = f"it has more than the {size} bytes that its index tells"
                        raise _Broken(text, for_good=True)
                    file.seek(begin)
                    file.write(piece)
                    done = begin + len(piece)
            if done < size:
                raise _Broken(f"it ended after {done} of {size} bytes")
            if _sum(path) != sha256:
                done = 0
                raise _Broken("its SHA-256 is not that of the index")

        with open(path, "wb") as file:
            file.truncate(size)  # so that its place on the disk counts from the start
        self._insist(url, attempt)
        sync(path)

    def _insist(self, url: str, attempt: Callable[[], None]) -> None:
        reason = ""
        for number in range(self.retries + 1):
            if number:
                time.sleep(min(0.1 * 2 ** (number - 1), LONGEST_WAIT))
            try:
                attempt()
                return
            except _Broken as error:
                reason = str(error)
                if error.for_good:
                    raise DataError(f"{url} cannot be fetched: {reason}; check data.path") from None
        raise DataError(
            f"{url} cannot be fetched, tried {self.retries + 1} times: {reason}; check the network, or raise "
            "data.retries or data.timeout"
        )

    def _pieces(self, url: str, begin: int) -> Iterator[tuple[int, bytes]]:
        """(where it lies, piece) from byte `begin` on, or from the first one. Raises _Broken, and DataError."""
        web = url.startswith(("http://", "https://"))
        with (
            _explained(self.timeout),
            (self._open_http if web else _open_store)(url, begin) as (source, at),
        ):
            while piece := source.read(PIECE):
                yield at, piece
                at += len(piece)
            if isinstance(source, http.client.HTTPResponse) and source.length:
                raise _Broken(f"it ended {source.length} bytes too early")

    @contextlib.contextmanager
    def _open_http(self, url: str, begin: int) -> Iterator[tuple[Any, int]]:
        request = urllib.request.Request(url, headers={"User-Agent": "speed-engine"})
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            told = answer.headers.get("Content-Range", "")
            partly = answer.status == 206 and told.startswith(f"bytes {begin}-")
            yield answer, begin if partly else 0  # a server may ignore the range and send it all


@contextlib.contextmanager
def _open_store(url: str, begin: int) -> Iterator[tuple[Any, int]]:
    try:
        import fsspec

        opened: Any = fsspec.open(url, "rb")
    except ImportError as error:  # fsspec, or its own package for the scheme
        raise DataError(f"{url} needs a package: {error}; `pip install` it") from None
    except ValueError as error:
        raise DataError(f"{url} cannot be opened ({_words(error)}); check data.path") from None
    with opened as file:
        file.seek(begin)
        yield file, begin


@contextlib.contextmanager
def _explained(timeout: float) -> Iterator[None]:
    """What goes wrong between here and the other side, in words."""
    try:
        yield
    except (_Broken, DataError):
        raise
    except urllib.error.HTTPError as error:
        for_good = error.code in FOR_GOOD and error.code not in AGAIN
        raise _Broken(f"the server answers {error.code} {error.reason}", for_good) from None
    except TimeoutError:
        raise _Broken(f"no byte came for {timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _Broken(f"no answer came for {timeout:g} s") from None
        raise _Broken(_words(error.reason)) from None
    except FileNotFoundError:
        raise _Broken("there is no such file", for_good=True) from None
    except PermissionError as error:
        raise _Broken(f"it may not be read ({_words(error)})", for_good=True) from None
    except http.client.HTTPException as error:
        raise _Broken(f"the answer broke off ({_words(error)})") from None
    except Exception as error:  # each store's package has errors of its own
        raise _Broken(f"{type(error).__name__}: {_words(error)}") from None


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(error: object) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
