"""Write and read checkpoints, from which a run resumes exactly.

A checkpoint is one file, `checkpoint/step_N.pt` in the run's folder. It is written under a temporary name and renamed, so
that a kill at any moment does not damage the previous one. Only the newest is kept.
"""

import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from cruijff_kit.util.files import atomic

_PATTERN = "step_*.pt"


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step and remove older ones.

    Args:
        folder: folder of the checkpoints; created if missing.
        step: number of steps so far.
        state: tensors, numbers, strings, and lists and dicts of them.
    """
    path = folder / f"step_{step:09d}.pt"
    with atomic(path) as draft, draft.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    for candidate in folder.glob("*step_*.pt*"):
        if candidate != path:
            candidate.unlink(missing_ok=True)
    return path


def read_newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the state of the newest checkpoint, on the CPU; None without a checkpoint."""
    paths = sorted(folder.glob(_PATTERN))
    return torch.load(paths[-1], map_location="cpu", weights_only=True) if paths else None


def get_rng_state() -> dict[str, Any]:
    """Return the state of every random number generator that training may use."""
    numpy_state: Any = numpy.random.get_state()
    name, keys, *rest = numpy_state
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the random number generators to a state of `get_rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
