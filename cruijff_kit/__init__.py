"""cruijff_kit: one line gives a sweep of LLM fine-tunes, trained, evaluated and compared.

From a shell: `python -m cruijff_kit.train --help`. From Python:

    config = cruijff_kit.compose(["lora.rank=8", "lr=5e-4"])
    result = cruijff_kit.train_then_eval(config)
    frame = cruijff_kit.read_sweep("multirun/capitalization")

Importing this module loads neither torch nor Hydra.
"""

import os
from typing import TYPE_CHECKING

from cruijff_kit.util.version import __version__

if TYPE_CHECKING:
    import pandas

    from cruijff_kit.config.run import RunConfig
    from cruijff_kit.records.result import RunResult

__all__ = ["__version__", "compose", "read_sweep", "train_then_eval"]

# How long OpenMP's threads spin before they sleep; read when torch is first loaded. Measured on two cores, one LoRA step
# of SmolLM2: endless spinning 0.29 s alone but 1.4 s beside another run, sleeping at once 0.60 and 0.51 s,
# this bounded spin 0.34 and 0.75 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> "RunConfig":
    """Compose a run's configuration from the same overrides as the shell's.

    Args:
        overrides: for example ["model=smollm2_135m", "lora.rank=8"].
        config_dir: folder with your own YAML (the shell's --config-dir).
    Raises:
        UserError: what the command would refuse.
    """
    from cruijff_kit.config.compose import compose

    return compose(overrides or [], config_dir)


def train_then_eval(config: "RunConfig") -> "RunResult":
    """Train and evaluate one run in this process; see cruijff_kit.runs.run.train_then_eval."""
    from cruijff_kit.runs.run import train_then_eval

    return train_then_eval(config)


def read_sweep(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """The results of all runs below a folder, one row per run; see cruijff_kit.analysis.results_frame.read_sweep."""
    from cruijff_kit.analysis.results_frame import read_sweep

    return read_sweep(folder)
