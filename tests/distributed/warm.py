"""Python processes that start in a tenth of a second: forked from one that has imported the libraries already.

Three fifths of a test of two short runs is the import of torch and DeepSpeed, the same every time. `Warm` is a
`subprocess.Popen` in all that a test sees: a process of its own, child of this one, with its own arguments, folder,
environment and output, its program run as `__main__`; only its end is short. Nothing of the project is imported
beforehand. Tests of launchers start cold ones.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from typing import Any

LIBRARIES = (
    "numpy", "pydantic", "rich.progress", "yaml", "safetensors.torch", "torch", "torch._dynamo",
    "torch._inductor.compile_fx", "torch.distributed", "deepspeed", "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage3",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36
FIRST_WORD = 8  # bytes that tell how long a request is


class Nest:
    """The process that forks; ends when this one closes its socket, however that happens."""

    def __init__(self) -> None:
        self.line, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                pass_fds=[other.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stdin=subprocess.DEVNULL,
            )

    def hatch(
        self, arguments: list[str], environment: dict[str, str], cwd: str, output: int
    ) -> int:
        """The number of a new process that runs arguments[0] and writes to `output`."""
        words = {
            "arguments": arguments,
            "environment": environment,
            "cwd": cwd,
            "parent": os.getpid(),
        }
        request = json.dumps(words).encode()
        _adopt_orphans(True)  # what the nest forks twice and lets go
        socket.send_fds(self.line, [len(request).to_bytes(FIRST_WORD, "big")], [output])
        self.line.sendall(request)
        number = int.from_bytes(_exactly(self.line, FIRST_WORD), "big")
        _adopt_orphans(False)
        return number

    def close(self) -> None:
        self.line.close()
        self.process.wait(20)


class Warm(subprocess.Popen[str]):
    """`python arguments...` with stdout and stderr in one pipe, out of the nest."""

    def __init__(self, nest: Nest, arguments: list[str], *, env: dict[str, str], cwd: str) -> None:
        self.nest = nest
        super().__init__(
            arguments, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """What Popen calls to start the process when its pipe is there."""
        (_, _, _, _, cwd, env, _, _, _, _, _, _, output, *_) = rest
        self.pid = self.nest.hatch(args, env, cwd, output)
        self._child_created = True
        os.close(output)


def _adopt_orphans(yes: bool) -> None:
    """Whether this process, rather than init, becomes the parent of its descendants that lose theirs."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def _exactly(line: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = line.recv(count - len(got))
        if not more:
            raise EOFError("the nest is gone")
        got += more
    return got


def _serve(line: socket.socket) -> list[str]:
    """Answer requests; returns only in a new process, with its arguments."""
    while True:
        first, descriptors, _, _ = socket.recv_fds(line, FIRST_WORD, 1)
        if not first:
            os._exit(0)
        words = json.loads(_exactly(line, int.from_bytes(first, "big")))
        told, tell = os.pipe()
        middle = os.fork()
        if middle == 0:
            if os.fork():
                os._exit(0)
            line.close()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored for ever
            _settle(words, descriptors[0], tell)
            os.close(told)
            return words["arguments"]
        os.waitpid(middle, 0)
        line.sendall(os.read(told, FIRST_WORD))
        for each in (told, tell, *descriptors):
            os.close(each)


def _settle(words: dict[str, Any], output: int, tell: int) -> None:
    """Become the process that was asked for, and say so once its parent is the one that asked."""
    while os.getppid() != words["parent"]:
        os.sched_yield()
    os.write(tell, os.getpid().to_bytes(FIRST_WORD, "big"))
    os.close(tell)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(words["environment"])
    os.chdir(words["cwd"])


def _run() -> int:
    """Run the program of sys.argv. Returns its exit code, by Python's own rules."""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end_with(code: int) -> None:
    """End at once: to take apart what was imported, in pages that were the nest's, costs a second or two."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in LIBRARIES:
        __import__(name)
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.path.dirname(sys.argv[0])
    _end_with(_run())
