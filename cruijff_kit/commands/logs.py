"""What a submitted run printed: `cruijff-kit logs DIR [RUN] [--follow] [--json]`.

--json: {"run", "log": the file, "lines": [...]}; with --follow when the run has ended.
"""

import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs, select_runs
from cruijff_kit.util.errors import UserError


def find_log(folder: Path, name: str | None, follow: bool) -> tuple[list[RunRef], RunInfo]:
    """The run of this name, as a list of one, and its row.

    Raises:
        UserError: no such run, several and none was named, or it has no log (with `follow`: and will have none).
    """
    runs = select_runs(find_runs(folder), [name] if name else [])
    if len(runs) > 1:
        names = ", ".join(k.entry.name if k.entry else k.folder.name for k in runs[:5])
        raise UserError(f"{folder} has {len(runs)} runs; name one: {names}" + (", ..." if len(runs) > 5 else ""))
    info = collect_states(runs)[0][0]
    if info.log is None:
        raise UserError(
            f"{info.name} was not submitted to SLURM; what it printed went to the terminal it was started in"
        )
    if not Path(info.log).exists() and not (follow and info.state in ACTIVE):
        raise UserError(
            f"{info.name} has no log yet: it is {info.state}" + (f" ({info.reason})" if info.reason else ""),
            fix=f"cruijff-kit status {folder} shows when it begins; --follow waits for it",
        )
    return runs, info


def log_text(runs: list[RunRef], info: RunInfo, follow: bool) -> Iterator[str]:
    """What the log of a run holds, piece by piece; with `follow` until the run has ended."""
    at, last, decoder = 0, False, codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        ended = info.state not in ACTIVE
        log = Path(info.log)
        if log.exists():
            with log.open("rb") as file:
                file.seek(at)
                read = file.read()
            at += len(read)
            yield decoder.decode(read)
        if not follow or (ended and last):
            return
        last = ended  # what is printed behind a run's end is shown too
        time.sleep(2.0)
        info = collect_states(runs)[0][0]


def _show(options: argparse.Namespace) -> dict[str, Any] | None:
    runs, info = find_log(options.folder, options.run, options.follow)
    if options.json:
        text = "".join(log_text(runs, info, options.follow))
        return {"run": info.name, "log": info.log, "lines": text.removesuffix("\n").split("\n") if text else []}
    for text in log_text(runs, info, options.follow):
        sys.stdout.write(text)
        sys.stdout.flush()
    return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser("logs", "What a submitted run printed.", "the run, its log and the lines as one JSON document")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a sweep's or a run's folder")
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's name, where DIR has several")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run has ended")
    return parser.run(argv, _show)


if __name__ == "__main__":
    raise SystemExit(main())
