"""Train and evaluate one run, or a sweep of runs with -m.

python -m cruijff_kit.train lora.rank=16 lr=5e-4
python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-4,5e-5
python -m cruijff_kit.train --help

--json: {"folder", "runs": as of `table --json`, "submitted", "existing"}; with dry_run=true {"dry_run", "folder", "runs",
"arrays"}; with --cfg the configuration.
"""

import gc
import sys

import hydra
from omegaconf import DictConfig

from cruijff_kit.commands.base import has_json_flag, import_from_cwd, run_command
from cruijff_kit.config.loading import register
from cruijff_kit.config.overrides import capture_output, order_arguments
from cruijff_kit.sweep import plugin

register()
plugin.register()


@hydra.main(version_base="1.3", config_path="pkg://cruijff_kit.conf", config_name="config")
def train(cfg: DictConfig) -> float | None:
    """One run; returns its objective, which Hydra's sweepers optimise."""
    from cruijff_kit.sweep.single_run import run_task

    return run_task(cfg)


def main(argv: list[str] | None = None) -> int:
    """The command, with errors explained; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    as_json = has_json_flag(given)

    def command() -> object:
        sys.argv[1:] = order_arguments([a for a in given if a != "--json"])  # Hydra reads it there
        if as_json:
            return capture_output(train, sys.argv[1:])
        train()
        return None

    import_from_cwd()
    code = run_command(command, as_json)
    gc.freeze()  # else the interpreter looks through millions of objects before it goes: seconds
    return code


if __name__ == "__main__":
    raise SystemExit(main())
