"""Train and evaluate one run, or a sweep of runs with -m.

python -m cruijff_kit.train lora.rank=16 lr=5e-4
python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-4,5e-5
python -m cruijff_kit.train --help
"""

import gc
import os
import sys

import hydra
from omegaconf import DictConfig

from cruijff_kit.command import hydra_arguments, run_command
from cruijff_kit.config import register
from cruijff_kit.launch import plugin

register()
plugin.register()


@hydra.main(version_base="1.3", config_path="pkg://cruijff_kit.conf", config_name="config")
def train(cfg: DictConfig) -> float | None:
    """One run; returns its objective, which Hydra's sweepers optimise."""
    from cruijff_kit.launch.task import run_task

    return run_task(cfg)


def main() -> int:
    """The command, with errors explained; returns the exit code."""

    def command() -> None:
        sys.argv[1:] = hydra_arguments(sys.argv[1:])
        train()

    if (
        os.getcwd() not in sys.path
    ):  # the user's own modules; `python -m` looks there by itself, an installed script does not
        sys.path.insert(0, os.getcwd())
    code = run_command(command)
    gc.freeze()  # else the interpreter looks through millions of objects before it goes: seconds
    return code


if __name__ == "__main__":
    raise SystemExit(main())
