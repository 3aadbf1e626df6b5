"""cruijff_kit: one line gives a sweep of LLM fine-tunes, trained, evaluated and compared.

From a shell: `python -m cruijff_kit.train --help`. From Python:

    config = cruijff_kit.compose(["lora.rank=8", "lr=5e-4"])
    result = cruijff_kit.train_then_eval(config)
    frame = cruijff_kit.read_sweep("multirun/capitalization")

Importing this module loads neither torch nor Hydra.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

    from cruijff_kit.config import RunConfig
    from cruijff_kit.result import RunResult

__all__ = ["compose", "read_sweep", "train_then_eval"]

# OpenMP threads that spin while they wait slow each other down on shared processors. Read when torch is first loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> "RunConfig":
    """Compose a run's configuration from the same overrides as the shell's.

    Args:
        overrides: for example ["model=smollm2_135m", "lora.rank=8"].
        config_dir: folder with YAML of your own beside ours (the shell's --config-dir).
    Raises:
        UserError: what the command would refuse.
    """
    from cruijff_kit.notebook import compose

    return compose(overrides or [], config_dir)


def train_then_eval(config: "RunConfig") -> "RunResult":
    """Train and evaluate one run in this process; see cruijff_kit.run.train_then_eval."""
    from cruijff_kit.run import train_then_eval

    return train_then_eval(config)


def read_sweep(folder: str | os.PathLike) -> "pandas.DataFrame":
    """The results of all runs below a folder, one row per run; see cruijff_kit.table.read_sweep."""
    from cruijff_kit.table import read_sweep

    return read_sweep(folder)
