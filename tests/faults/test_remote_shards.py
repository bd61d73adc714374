"""Shards on an HTTP server that stalls, truncates, lies and fails, and in an object store: read, or one sentence."""

import http.server
import importlib.util
import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from speed_engine.data import DataError, shards
from speed_engine.data.shards import Shards
from speed_engine.data.storage import fetch
from speed_engine.data.storage.fetch import is_url
from speed_engine.data.storage.writer import SetWriter

NUM, EACH = 12, 3  # samples, and of a shard
X = np.arange(NUM * 300, dtype=np.float32).reshape(NUM, 3, 10, 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "set"
    with SetWriter(out, {}, shard_size=EACH) as writer:
        for i in range(NUM):
            writer.write(i + 1, X[i], i % 3)
        writer.finish(scale=1.0)
    return out


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. faults: for each file's name what is wrong with its next answers, one word an answer."""

    daemon_threads = True
    ranges = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass  # readers that go away are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *_) -> None:
        pass

    def do_GET(self) -> None:
        name, span = self.path.strip("/"), self.headers.get("Range", "")
        self.server.asked.append((name, span))
        fault = (self.server.faults.get(name) or [""]).pop(0)
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            return self.send_error(int(fault or 404))
        body, status = path.read_bytes(), 200
        begin = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        total = len(body)
        if begin and self.server.ranges:
            status, body = 206, body[begin:]
        if fault == "longer":
            body += b"more"
        if fault == "damaged":
            half = len(body) // 2
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        if fault != "unmeasured":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "stalls":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(1.5)
        elif fault in ("truncated", "unmeasured"):
            self.wfile.write(body[: len(body) // 2])
        elif fault == "reset":
            self.wfile.write(body[:100])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
        else:
            self.wfile.write(body)


@pytest.fixture
def server(whole, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    one = Server(whole)
    threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def source(url, cache, most=10**9, retries=2, timeout=0.3, **told):
    told |= {"path": url, "cache": str(cache), "cache_bytes": most}
    config = shards.Config(**told, retries=retries, timeout=timeout, check_scale=False)
    return shards.build(config)


def shard_files(cache):
    return sorted(path.name for path in cache.glob("*/*.tar"))


def test_what_is_an_address():
    assert is_url("https://a/b") and is_url("s3://a/b") and not is_url("data/mine")
    assert not is_url("/data/http://a") and not is_url("C:/data")


def test_values_order_and_facts_are_those_of_the_folder(server, whole, tmp_path):
    here, there = Shards(whole, check_scale=False), source(server.url, tmp_path / "cache")
    assert there.fingerprint == here.fingerprint and there.facts == here.facts
    assert shard_files(tmp_path / "cache") == []  # nothing before it is asked for
    order = [7, 1, 1, 8]
    stored, told = there.read(order)
    assert np.array_equal(stored.numpy(), X[order]) and told["label"].tolist() == [1, 1, 1, 2]
    assert shard_files(tmp_path / "cache") == ["shard-000000.tar", "shard-000002.tar"]
    total = sum(path.stat().st_size for path in whole.glob("*.tar"))
    assert any(f"4 shards of {server.url}, {total} bytes, come into" in r for r in there.remarks)
    server.asked.clear()
    again = source(server.url + "/index.json", tmp_path / "cache")
    assert np.array_equal(again.read(order)[0].numpy(), X[order])
    assert [name for name, _ in server.asked] == ["index.json"]  # the rest is here
    assert any(f"2 shards of {server.url}, " in remark for remark in again.remarks)


@pytest.mark.parametrize(
    "faults",
    [
        ["truncated"],
        ["unmeasured"],
        ["reset"],
        ["stalls"],
        ["damaged"],
        ["503", "429"],
        ["truncated", "truncated"],
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_fetch_that_fails_is_tried_again(server, tmp_path, monkeypatch, faults, ranges):
    monkeypatch.setattr(fetch, "PIECE", 64)
    server.ranges = ranges
    server.faults = {"shard-000001.tar": [*faults], "index.json": ["truncated"]}
    stored, _ = source(server.url, tmp_path / "cache").read(range(NUM))
    assert np.array_equal(stored.numpy(), X)
    spans = [span for name, span in server.asked if name == "shard-000001.tar"]
    assert len(spans) == 1 + len(faults)
    if faults[0] != "reset":  # what had come may be lost with it
        assert bool(spans[-1]) == (faults[0] not in ("damaged", "503"))  # taken up where it stopped
    assert not list((tmp_path / "cache").glob("*/*.partial"))


@pytest.mark.parametrize(
    ("name", "faults", "reason"),
    [
        (
            "shard-000001.tar",
            ["stalls"] * 3,
            "tried 3 times: no byte came for 0.3 s; check the netw",
        ),
        ("shard-000001.tar", ["500"] * 3, "tried 3 times: the server answers 500 Internal Server"),
        (
            "shard-000001.tar",
            ["damaged"] * 3,
            "tried 3 times: its SHA-256 is not that of the index",
        ),
        ("shard-000001.tar", ["404"], "cannot be fetched: the server answers 404 Not Found; check"),
        ("shard-000001.tar", ["longer"], "it has more than the "),
        ("shard-000001.idx.npy", ["damaged"], "belongs to another index; put the set there again"),
        ("index.json", ["403"], "index.json cannot be fetched: the server answers 403 Forbidden"),
        ("index.json", ["damaged"], "index.json"),
    ],
)
def test_in_the_end_it_is_one_sentence_and_nothing_is_left(server, tmp_path, name, faults, reason):
    server.faults = {name: faults}
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        source(server.url, tmp_path / "cache").read(range(NUM))
    assert time.monotonic() - began < 5
    assert (
        reason in str(caught.value)
        and name in str(caught.value)
        and server.url in str(caught.value)
    )
    assert not list((tmp_path / "cache").glob("*/*.partial"))
    assert "shard-000001.tar" not in shard_files(tmp_path / "cache")


def test_a_shard_out_of_reach_is_no_damaged_sample(server, tmp_path):
    """skip_damaged would go through all samples, one time-out after the other."""
    one = source(server.url, tmp_path / "cache", skip_damaged=True)
    server.faults = {"shard-000001.tar": ["404"]}
    with pytest.raises(DataError, match=r"shard-000001\.tar cannot be fetched"):
        one.read([EACH])


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError, match=r"tried 2 times: .*refused"):
        source("http://127.0.0.1:9", tmp_path / "cache", retries=1)
    with pytest.raises(DataError, match="has a question mark"):
        source("http://127.0.0.1:9/?key=1", tmp_path / "cache")
    with pytest.raises(DataError, match="holds a name or a password") as caught:
        source("http://me:secret@127.0.0.1:9/set", tmp_path / "cache")
    assert "secret" not in str(caught.value)


def test_a_small_cache_gives_up_the_least_recently_used(server, whole, tmp_path):
    size = max(path.stat().st_size for path in whole.glob("*.tar"))
    cache = tmp_path / "cache"
    one = source(server.url, cache, most=2 * size)
    assert any("raise it where there is room" in remark for remark in one.remarks)
    for first, expected in ((0, "0"), (3, "01"), (6, "12"), (3, "12"), (9, "13"), (0, "01")):
        sample = [first]
        assert np.array_equal(one.read(sample)[0].numpy(), X[sample])
        if first == 3:  # used after the other one, by the clock that decides
            os.utime(next(cache.glob("*/shard-000001.tar")), (time.time() + first,) * 2)
        assert [name[11] for name in shard_files(cache)] == list(expected)
    assert np.array_equal(
        one.read(range(NUM))[0].numpy(), X
    )  # more in a batch than there is room for
    assert len(shard_files(cache)) == 2
    with pytest.raises(DataError, match=r"less than the largest shard"):
        source(server.url, cache, most=size - 1)


def test_many_readers_share_what_one_fetches(server, tmp_path):
    wrong = []

    def read():
        mine = source(server.url, tmp_path / "cache")
        for i in range(NUM):
            if not np.array_equal(mine.read([i])[0].numpy(), X[[i]]):
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [name for name, _ in server.asked if name != "index.json"]
    assert not wrong and len(asked) == len(set(asked)) == 2 * NUM // EACH


def test_what_a_killed_process_left_is_cleared_and_damage_is_mended(server, tmp_path):
    cache = tmp_path / "cache"
    one = source(server.url, cache)
    left = one.folder / "shard-000002.tar.partial"
    left.write_bytes(b"half")
    one.read([0])
    assert not left.exists()
    path = one.folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    stored, _ = source(server.url, cache).read(range(NUM))
    assert np.array_equal(stored.numpy(), X)
    path.write_bytes(content[:-10])
    assert np.array_equal(source(server.url, cache).read([1])[0].numpy(), X[[1]])


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .* choose another data.cache"):
        source(server.url, tmp_path / "file")


def test_an_object_store(whole, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in whole.iterdir():
        with store.open(f"/bucket/set/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    try:
        stored, _ = source("memory://bucket/set", tmp_path / "cache").read(range(NUM))
        assert np.array_equal(stored.numpy(), X)
        store.rm("/bucket/set/shard-000003.tar")
        fresh = source("memory://bucket/set", tmp_path / "other")
        with pytest.raises(
            DataError, match=r"shard-000003\.tar cannot be fetched: there is no such"
        ):
            fresh.read([NUM - 1])
        if importlib.util.find_spec("s3fs") is None:
            with pytest.raises(
                DataError, match=r"s3://bucket/.* needs a package: .*s3fs.*pip install"
            ):
                source("s3://bucket/set", tmp_path / "cache")
        with pytest.raises(DataError, match=r"cannot be opened .*check data.path"):
            source("nothing://bucket/set", tmp_path / "cache")
    finally:
        store.rm("/bucket", recursive=True)
