"""Go on with what was interrupted or failed: `python -m cruijff_kit.resume DIR`.

DIR is a run or a sweep. Each run that is not done goes on from its newest checkpoint, or starts if it has none, with the
configuration that was frozen when the sweep began. Runs that are done are left alone.
"""

import argparse
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from cruijff_kit.command import run_command
from cruijff_kit.config import RunConfig, load, register
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.folder import RunFolder
from cruijff_kit.progress import say
from cruijff_kit.result import read_result


def unfinished(folder: Path) -> list[Path]:
    """Folders of the runs below a folder that are not done, by name.

    Raises:
        UserError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    runs = [p.parent for p in sorted(folder.rglob("swept.json"))]
    if not runs:
        raise UserError(f"{folder} holds no runs; give a run's or a sweep's folder")
    return [r for r in runs if not (r / "result.json").exists() or read_result(r / "result.json").status != "done"]


def frozen(run: Path) -> RunConfig:
    """The configuration that a run began with, set to resume; its folder may have been moved.

    Raises:
        UserError: the file is not a configuration of this version.
    """
    register()
    text = (run / "config.yaml").read_text(encoding="utf-8")
    began_in = OmegaConf.create(text).output_dir
    cfg = OmegaConf.create(text.replace(began_in, str(run.absolute())))
    cfg.resume_from_checkpoint = cfg.torchtune.resume_from_checkpoint = True
    cfg.torchtune.metric_logger.append = True
    return load(cfg)


def resume(folder: Path) -> None:
    """Finish the runs below a folder, then show the table.

    Raises:
        UserError: as unfinished.
        SystemExit: with code 1, after the table, if a run failed again.
    """
    from cruijff_kit.launch.callback import write_and_show
    from cruijff_kit.run import train_then_eval

    runs = unfinished(folder)
    say(f"{len(runs)} runs to finish" if runs else "every run is done")
    failed = 0
    try:
        for place, run in enumerate(runs, 1):
            say(f"[{place}/{len(runs)}] {run.name}")
            try:
                train_then_eval(frozen(run), json.loads((run / "swept.json").read_text(encoding="utf-8")))
            except Exception as error:
                failed += 1
                say(f"[{place}/{len(runs)}] {run.name} failed: {one_line(error)}")
    finally:
        if RunFolder(folder).result.exists():
            from cruijff_kit.table import show_results

            show_results(folder)
        else:
            write_and_show(folder)
    if failed:
        sys.exit(1)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m cruijff_kit.resume", description="Finish what is not done.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run's or a sweep's folder")
    options = parser.parse_args(argv)
    return run_command(lambda: resume(options.folder))


if __name__ == "__main__":
    raise SystemExit(main())
