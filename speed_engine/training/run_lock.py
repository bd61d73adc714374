"""One run in a run folder: a lock that ends with the process, however it ends, and says who holds it.

The lock is the kernel's (flock) on the file `lock`; its text is for people. A machine is told by the id of its boot, so
that a host that is renamed is still the same one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path

from speed_engine.distributed import Processes

BOOT = Path("/proc/sys/kernel/random/boot_id")
PATIENCE = 10.0  # seconds until a network file system shows another machine what was written


class InUse(ValueError):
    """Another run holds the folder."""


class RunLock:
    """Holds `folder`, which is made if it is not there, until `close`.

    Raises InUse if another run holds it, OSError where the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "lock"
        self.new = [p for p in (folder, *folder.parents) if not p.exists()]  # innermost first
        folder.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(8)
        self.unlocked: str | None = None  # why the file system gives no locks
        self._open()

    def _open(self) -> None:
        while True:
            self.file = self.path.open("a+", encoding="utf-8")
            self._take()
            if self.held():
                break
            self.file.close()  # the one before has removed it between our two calls
        self.file.truncate(0)
        holder = {"process": os.getpid(), "host": socket.gethostname(), "boot": _boot()}
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(json.dumps({**holder, "since": since, "token": self.token}) + "\n")
        self.file.flush()

    def _take(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                self.unlocked = (
                    f"{self.folder} gives no locks ({error.strerror}): start no second run in it"
                )
                return
            self.file.seek(0)
            told = _told(self.file.read())
            self.file.close()
            raise InUse(f"{self.folder} is in use by {told}, or choose another run_dir") from error

    def held(self) -> bool:
        """Whether the lock is still the one in the folder: nobody has removed or replaced it."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False

    def retake(self) -> bool:
        """Lock the folder anew if somebody has removed it, or the lock; whether that was so.

        Raises InUse if another run has moved in.
        """
        if self.held():
            return False
        self.file.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open()
        return True

    def close(self, undo: bool = False) -> None:
        """Let go. `undo`: remove the lock, and the folders that were made for it if they are empty."""
        if undo and self.held():
            self.path.unlink()
            with contextlib.suppress(OSError):
                for folder in self.new:
                    folder.rmdir()
        self.file.close()


def refuse_other_folders(folder: Path, token: str, processes: Processes) -> None:
    """Every process must see the folder that the first one has locked. Collective.

    Raises ValueError where a machine has another one under this name: a disk of its own.
    """
    token = processes.from_first(token)

    def see() -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                if token in (folder / "lock").read_text(encoding="utf-8"):
                    return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process {processes.rank} on {socket.gethostname()} does not see the run folder {folder} of "
                    "process 0; choose a run_dir that all machines share"
                )
            time.sleep(0.2)

    processes.attempt(see)


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _told(text: str) -> str:
    """Who holds the lock and what to do, from what the holder wrote."""
    try:
        holder = json.loads(text)
        number, host, since = int(holder["process"]), holder["host"], holder["since"]
        boot = holder["boot"]
    except (ValueError, KeyError, TypeError):
        return f"{text.strip() or 'another process'}; wait for it to end"
    who = f"process {number} on {host} since {since}"
    if boot != _boot():
        return (
            f"{who}; wait for it to end (if that machine is gone, its file server still keeps the lock: remove the "
            "file `lock`)"
        )
    if not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
        return f"a process that {who} left behind; end that one"
    return f"{who}; wait for it to end"
