"""Train and evaluate one run, or a sweep of runs with -m.

    python -m cruijff_kit.train lora.rank=16 lr=5e-4
    python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-4,5e-5
    python -m cruijff_kit.train --help
"""

import hydra
from omegaconf import DictConfig

from cruijff_kit.command import run_command
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
    return run_command(train)


if __name__ == "__main__":
    raise SystemExit(main())
