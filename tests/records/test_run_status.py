"""What a heartbeat says of a run's memory."""

import subprocess
import sys
import time

import pytest

from cruijff_kit.records.run_status import read_status

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from cruijff_kit.records.run_status import Heartbeat

mine = bytearray(300 << 20)
with Heartbeat(Path(sys.argv[1])) as heartbeat:
    if sys.argv[2] == "fork":
        child = os.fork()
        if child == 0:
            own = bytearray(100 << 20)
            sys.stdin.read()
            os._exit(0)
    elif sys.argv[2] == "start":
        hold = "import sys; own = bytearray(100 << 20); sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", hold])
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("child", "megabytes"), [("none", 300), ("fork", 400), ("start", 400)])
def test_memory_is_that_of_the_process_and_its_children(tmp_path, child, megabytes):
    """What a fork has in common with its parent counts once."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), child], stdin=subprocess.PIPE)
    deadline, seen = time.monotonic() + 60, 0.0
    while seen < megabytes:
        assert time.monotonic() < deadline and process.poll() is None, seen
        time.sleep(0.5)
        seen = (read_status(tmp_path).memory_bytes or 0) / 2**20 if (tmp_path / "status.json").exists() else 0
    time.sleep(1)
    process.stdin.close()
    process.wait()
    assert megabytes < read_status(tmp_path).memory_bytes / 2**20 < megabytes + 90
