"""The program of the probe job. A copy of this file runs on the node, so it needs nothing but Python."""

import importlib
import json
import os
import socket
import sys


def probe(answer: str, mark: str, start: str, with_gpus: bool) -> None:
    """Write what this node sees.

    Args:
        answer: file to write.
        mark: a file in the cache of the machine that submitted the job.
        start: the folder where the command was given.
        with_gpus: count the GPUs that torch reaches.
    """
    report: dict = {"hostname": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "python": sys.executable}
    sys.path[0] = start  # as `python -m` has it
    try:
        report["package"] = os.path.dirname(importlib.import_module("cruijff_kit").__file__)
    except Exception as error:
        report["error"] = f"cruijff_kit cannot be imported: {error}"
    report["cache_shared"] = os.access(mark, os.W_OK)
    if with_gpus:
        try:
            cuda = importlib.import_module("torch.cuda")  # in the job alone: the command itself stays without torch
            report["torch_gpus"] = cuda.device_count() if cuda.is_available() else 0
        except Exception:
            report["torch_gpus"] = 0
    draft = f"{answer}.draft"
    with open(draft, "w") as file:
        json.dump(report, file)
    os.replace(draft, answer)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        probe(**json.load(file))
