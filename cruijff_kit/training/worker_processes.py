"""Worker processes that train one run together: started, watched and ended by the run's process.

They exchange lines of JSON: a worker reads its task and requests to stop from its standard input, and sends messages on a
pipe of its own. A worker whose standard input ends has lost the run's process, and ends too. No torch here.
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
_GRACE_SECONDS = 1.0  # in which a death shows that explains another worker's error


class WorkerDied(RuntimeError):
    """A worker ended without a message."""


class Workers:
    """Processes 0 to n-1 of one program. Use as a context, which ends those that are left.

    Args:
        module: what `python -m` starts.
        tasks: one per worker; handed to `ParentConnection`.
        environment: variables that a worker gets besides this process's; one dict per worker.
    """

    def __init__(self, module: str, tasks: list[dict[str, Any]], environment: list[dict[str, str]]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cruijff_kit-")
        self._selector: Any = selectors.DefaultSelector()
        self.processes: list[subprocess.Popen] = []
        for task, variables in zip(tasks, environment, strict=True):
            self._start(module, task, variables)

    def _start(self, module: str, task: dict[str, Any], variables: dict[str, str]) -> None:
        number = len(self.processes)
        ours, theirs = os.pipe()
        task = {
            **task,
            "pipe": theirs,
            "rendezvous": str(self.folder / "rendezvous"),
            "stack": str(self._stack(number)),
        }
        paths = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module],
            stdin=subprocess.PIPE,
            pass_fds=[theirs],
            env=os.environ | {"PYTHONPATH": paths} | variables,
            text=True,
        )
        os.close(theirs)
        self.processes.append(process)
        self._selector.register(os.fdopen(ours, "rb", buffering=0), selectors.EVENT_READ, [number, b""])
        self._tell(process, task)

    @property
    def folder(self) -> Path:
        """A folder that all workers know; it is removed in the end."""
        return Path(self._folder.name)

    def _stack(self, number: int) -> Path:
        return self.folder / f"worker_{number}.stack"

    def ask_to_stop(self, reason: str) -> None:
        """Tell every worker that it should stop."""
        for process in self.processes:
            self._tell(process, {"stop": reason})

    def _tell(self, process: subprocess.Popen, message: dict[str, Any]) -> None:
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError:  # the worker has ended; `messages` will say so
            pass

    def messages(self) -> Iterator[dict[str, Any] | None]:
        """Yield the workers' messages as they come, and None now and then, until all have ended well.

        A message that has "error" is held back for a moment: the death of another worker explains it better.

        Raises:
            WorkerDied: a worker ended otherwise without a message.
        """
        while self._selector.get_map() or any(p.poll() is None for p in self.processes):
            for message in self._read():
                if "error" in message:
                    time.sleep(_GRACE_SECONDS)
                    self._refuse_dead(signals_only=True)
                yield message
            self._refuse_dead(signals_only=bool(self._selector.get_map()))
            yield None

    def _read(self) -> list[dict[str, Any]]:
        messages = []
        for key, _ in self._selector.select(_POLL_SECONDS):
            read = key.fileobj.read(1 << 16)
            if not read:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                continue
            *lines, key.data[1] = (key.data[1] + read).split(b"\n")
            messages += [{"worker": key.data[0], **json.loads(line)} for line in lines]
        return messages

    def _refuse_dead(self, signals_only: bool) -> None:
        for number, process in enumerate(self.processes):
            code = process.poll()
            if not code or (code > 0 and signals_only):
                continue
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            error = WorkerDied(f"worker {number} of {len(self.processes)} {how}")
            if self._stack(number).exists() and (stack := self._stack(number).read_text()):
                error.add_note(f"where it was:\n{stack}")
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
    """A worker's line to the process that started it: `task` is what it was given, `stop_reason` why it should stop."""

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):  # a terminal and a cluster send them to all
            signal.signal(number, signal.SIG_IGN)
        self.task: dict[str, Any] = json.loads(sys.stdin.readline())
        self.stop_reason: str | None = None
        self._pipe = os.fdopen(self.task["pipe"], "w", buffering=1)
        faulthandler.enable(open(self.task["stack"], "w"))  # noqa: SIM115 (open as long as the process)
        threading.Thread(target=self._listen, daemon=True, name="boss").start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.stop_reason = json.loads(line)["stop"]
        os._exit(1)  # the run's process has gone

    def tell(self, **message: Any) -> None:
        """Say something to the run's process."""
        self._pipe.write(json.dumps(message) + "\n")
