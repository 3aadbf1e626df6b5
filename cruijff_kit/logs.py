"""What a submitted run printed: `python -m cruijff_kit.logs DIR [RUN] [--follow]`."""

import argparse
import sys
import time
from pathlib import Path

from cruijff_kit.command import run_command
from cruijff_kit.errors import UserError
from cruijff_kit.hints import did_you_mean
from cruijff_kit.run_status import ACTIVE
from cruijff_kit.survey import Known, RunView, known_below, survey


def chosen_runs(runs: list[Known], names: list[str]) -> list[Known]:
    """The runs of these names; all of them if none is named.

    Raises:
        UserError: no run has that name.
    """
    by_name = {(k.entry.name if k.entry else k.folder.name): k for k in runs}
    for name in names:
        if name not in by_name:
            raise UserError(f"no run is called {name}; {did_you_mean(name, [*by_name])}")
    return [by_name[n] for n in names] if names else runs


def show_log(folder: Path, name: str | None, follow: bool) -> None:
    """Print a run's log; with `follow`, go on until the run has ended.

    Raises:
        UserError: no such run, several and none was named, or it has no log.
    """
    runs = chosen_runs(known_below(folder), [name] if name else [])
    if len(runs) > 1:
        names = ", ".join(k.entry.name if k.entry else k.folder.name for k in runs[:5])
        raise UserError(f"{folder} has {len(runs)} runs; name one: {names}" + (", ..." if len(runs) > 5 else ""))
    view = survey(runs)[0][0]
    if view.log is None:
        raise UserError(
            f"{view.name} was not submitted to SLURM; what it printed went to the terminal it was started in"
        )
    if not Path(view.log).exists() and not (follow and view.state in ACTIVE):
        raise UserError(
            f"{view.name} has no log yet: it is {view.state}" + (f" ({view.reason})" if view.reason else "")
        )
    _print_from(view, runs, 0, follow)


def _print_from(view: RunView, runs: list[Known], at: int, follow: bool) -> None:
    last = False
    while True:
        ended = view.state not in ACTIVE
        log = Path(view.log)
        if log.exists():
            with log.open("rb") as file:
                file.seek(at)
                text = file.read()
            at += len(text)
            sys.stdout.write(text.decode("utf-8", errors="replace"))
            sys.stdout.flush()
        if not follow or (ended and last):
            return
        last = ended  # what is printed behind a run's end is shown too
        time.sleep(2.0)
        view = survey(runs)[0][0]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m cruijff_kit.logs", description="What a submitted run printed.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a sweep's or a run's folder")
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's name, where DIR has several")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run has ended")
    options = parser.parse_args(argv)
    return run_command(lambda: show_log(options.folder, options.run, options.follow))


if __name__ == "__main__":
    raise SystemExit(main())
