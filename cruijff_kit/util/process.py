"""Memory and garbage collection of this process."""

import gc
import os
import threading
import time
from pathlib import Path

_SECONDS_BETWEEN_SAMPLES = 0.3  # of memory, which grows by hundreds of megabytes a second while torch is imported


class MemoryMeter:
    """Measures the memory of this process and its children, once for the heartbeats of all runs of a group."""

    def __init__(self) -> None:
        self._lock, self._measured_at, self._bytes = threading.Lock(), float("-inf"), 0

    def measure(self) -> int:
        """Return the bytes that are resident now, or were half of the time between two samples ago."""
        with self._lock:
            if time.monotonic() - self._measured_at > _SECONDS_BETWEEN_SAMPLES / 2:
                self._bytes, self._measured_at = _resident_bytes(), time.monotonic()
            return self._bytes


MEMORY_METER = MemoryMeter()


def _resident_bytes() -> int:
    """Bytes of this process and its children; of a fork only its private pages, because it shares the others with us."""
    pid = os.getpid()
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # not Linux
        children = []
    command = _command(pid)
    forks = {child for child in children if _command(child) == command}
    pages = _pages(pid) + sum(_pages(child) for child in children if child not in forks)
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_private_bytes, forks))


def _command(pid: int | str) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None


def _private_bytes(pid: int | str) -> int:
    """Read smaps_rollup, see proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended, or the kernel is older than 4.14
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _pages(pid: int | str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # it has ended, or this is not Linux
        return 0


def collect_garbage_rarely() -> None:
    """Let Python collect garbage every 10,000 objects instead of 700, which took an eighth of a short run's time, mostly
    during imports."""
    gc.set_threshold(10_000)
