"""Convert Hydra's composed config to the typed config of a run."""

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict, read_write

from cruijff_kit.analysis.results_frame import make_empty_dict
from cruijff_kit.config.loading import load
from cruijff_kit.config.run import RunConfig
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say

# The launcher knows the swept values; Hydra's task function takes the config alone.
swept: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("swept", default={})  # noqa: B039 (never written)


@contextlib.contextmanager
def set_swept(values: dict[str, Any]) -> Iterator[None]:
    """Within this context, these values distinguish the run in its sweep."""
    token = swept.set(values)
    try:
        yield
    finally:
        swept.reset(token)


def warn_ignored_overrides(config: RunConfig, typed: list[str]) -> None:
    """Warn of slurm settings that were typed for a local run."""
    keys = [o.lstrip("+").partition("=")[0] for o in typed]
    ignored = [k for k in keys if k.startswith("slurm.") and k != "slurm.submit"]
    if ignored and not config.slurm.submit:
        say(f"{', '.join(ignored)}: ignored, because this run is local; add slurm=cluster to submit it")


def load_task(cfg: DictConfig, output_dir: str) -> RunConfig:
    """Type the config of a run whose folder is known. Raises UserError as config.load."""
    with read_write(cfg), open_dict(cfg):
        cfg.output_dir = str(Path(output_dir).absolute())
    return load(cfg)


def start_output(folder: Path) -> None:
    """Start the JSON output with the keys that it always has. (Called once per batch of a sweep.)"""
    json_output.record(folder=str(folder.absolute()), **make_empty_dict())
    json_output.append(submitted=[], existing=[])
