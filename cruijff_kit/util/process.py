"""This process: the memory it holds, and its garbage collection."""

import gc
import os
import threading
import time
from pathlib import Path

_SECONDS_BETWEEN_SAMPLES = 0.3  # of memory, which grows by hundreds of megabytes a second while torch is imported


class HeldMemory:
    """Bytes that this process and its children hold, measured once for the heartbeats of all runs of a group."""

    def __init__(self) -> None:
        self._lock, self._measured, self._held = threading.Lock(), float("-inf"), 0

    def held(self) -> int:
        """Now, or half of the time between two samples ago at most."""
        with self._lock:
            if time.monotonic() - self._measured > _SECONDS_BETWEEN_SAMPLES / 2:
                self._held, self._measured = _resident_bytes(), time.monotonic()
            return self._held


HELD_MEMORY = HeldMemory()


def _resident_bytes() -> int:
    """Of this process and its children; a fork's own, as the rest of its pages are this process's."""
    me = os.getpid()
    try:
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    except OSError:  # not Linux
        children = []
    command = _command(me)
    forks = {child for child in children if _command(child) == command}
    pages = _pages(me) + sum(_pages(child) for child in children if child not in forks)
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_private_bytes, forks))


def _command(pid: int | str) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None


def _private_bytes(pid: int | str) -> int:
    """proc(5), smaps_rollup."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has gone, or the kernel is older than 4.14
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _pages(pid: int | str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # it has gone, or this is not Linux
        return 0


def collect_rarely() -> None:
    """Let Python look for garbage every 10,000 objects instead of 700: for a run that is soon over, that was an eighth of
    its time, most of it during imports."""
    gc.set_threshold(10_000)
