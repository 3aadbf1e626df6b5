"""Start, watch and end worker processes that train one run together. No torch.

The run's process and its workers exchange lines of JSON: a worker reads its task and stop requests from standard input, and
sends messages through its own pipe. When its standard input closes, the run's process has ended, and the worker exits.
"""

import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 1.0  # a worker's error waits this long: the death of another worker may be its cause


class WorkerDied(RuntimeError):
    """A worker ended without a message."""


class Workers:
    """Processes 0 to n-1 of one program. Use as a context manager; its end kills the remaining processes.

    Args:
        module: program, as for `python -m`.
        tasks: one per worker; `ParentConnection.task` in the worker.
        environment: additional environment variables; one dict per worker.
    """

    def __init__(self, module: str, tasks: list[dict[str, Any]], environment: list[dict[str, str]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cruijff_kit-")
        self._selector: Any = selectors.DefaultSelector()
        self.processes: list[subprocess.Popen] = []
        for task, variables in zip(tasks, environment, strict=True):
            self._start(module, task, variables)

    def _start(self, module: str, task: dict[str, Any], variables: dict[str, str]) -> None:
        number = len(self.processes)
        read_end, write_end = os.pipe()
        task = {
            **task,
            "pipe": write_end,
            "rendezvous": str(self.folder / "rendezvous"),
            "stack": str(self._stack_file(number)),
        }
        paths = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module],
            stdin=subprocess.PIPE,
            pass_fds=[write_end],
            env=os.environ | {"PYTHONPATH": paths} | variables,
            text=True,
        )
        os.close(write_end)
        self.processes.append(process)
        self._selector.register(os.fdopen(read_end, "rb", buffering=0), selectors.EVENT_READ, [number, b""])
        self._send(process, task)

    @property
    def folder(self) -> Path:
        """Return the temporary folder of all workers; the end of the context removes it."""
        return Path(self._folder.name)

    def _stack_file(self, number: int) -> Path:
        return self.folder / f"worker_{number}.stack"

    def request_stop(self, reason: str) -> None:
        """Request every worker to stop."""
        for process in self.processes:
            self._send(process, {"stop": reason})

    def _send(self, process: subprocess.Popen, message: dict[str, Any]) -> None:
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError:  # the worker has ended; `messages` raises WorkerDied
            pass

    def messages(self) -> Iterator[dict[str, Any] | None]:
        """Yield the workers' messages, and None at least every 0.1 s, until all workers have ended.

        A message with "error" waits for a second: if another worker died, its death is the better explanation.

        Raises:
            WorkerDied: a worker was killed, or failed without a message.
        """
        while self._selector.get_map() or any(p.poll() is None for p in self.processes):
            for message in self._read():
                if "error" in message:
                    time.sleep(_GRACE_SECONDS)
                    self._raise_if_dead(signals_only=True)
                yield message
            self._raise_if_dead(signals_only=bool(self._selector.get_map()))
            yield None

    def _read(self) -> list[dict[str, Any]]:
        messages = []
        for key, _ in self._selector.select(_POLL_SECONDS):
            chunk = key.fileobj.read(1 << 16)
            if not chunk:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                continue
            *lines, key.data[1] = (key.data[1] + chunk).split(b"\n")
            messages += [{"worker": key.data[0], **json.loads(line)} for line in lines]
        return messages

    def _raise_if_dead(self, signals_only: bool) -> None:
        for number, process in enumerate(self.processes):
            code = process.poll()
            if not code or (code > 0 and signals_only):
                continue
            outcome = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            error = WorkerDied(f"worker {number} of {len(self.processes)} {outcome}")
            if self._stack_file(number).exists() and (stack := self._stack_file(number).read_text()):
                error.add_note(f"its stack:\n{stack}")
            raise error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            process.stdin.close()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()
        self._folder.cleanup()


class ParentConnection:
    """A worker's connection to the run's process: `task` is its task, `stop_reason` the reason of a stop request."""

    def __init__(self) -> None:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGUSR2,
        ):  # a terminal and SLURM send them to all processes
            signal.signal(number, signal.SIG_IGN)
        self.task: dict[str, Any] = json.loads(sys.stdin.readline())
        self.stop_reason: str | None = None
        self._pipe = os.fdopen(self.task["pipe"], "w", buffering=1)
        faulthandler.enable(open(self.task["stack"], "w"))  # noqa: SIM115 (open until the process ends)
        threading.Thread(target=self._listen, daemon=True, name="parent-connection").start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.stop_reason = json.loads(line)["stop"]
        os._exit(1)  # the run's process has ended

    def send(self, **message: Any) -> None:
        """Send a message to the run's process."""
        self._pipe.write(json.dumps(message) + "\n")
