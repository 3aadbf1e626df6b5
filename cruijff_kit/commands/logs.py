"""Show the output of a submitted run: `cruijff-kit logs DIR [RUN] [--follow] [--json]`.

--json: {"run", "log": the file, "lines": [...]}; with --follow once the run has ended.
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
    """Return the run of this name, as a list of one, and its state.

    Raises:
        UserError: no such run, several and none was named, or it has no log (with `follow`: and will have none).
    """
    runs = select_runs(find_runs(folder), [name] if name else [])
    if len(runs) > 1:
        names = ", ".join(ref.name for ref in runs[:5])
        raise UserError(f"{folder} has {len(runs)} runs; name one: {names}" + (", ..." if len(runs) > 5 else ""))
    info = collect_states(runs)[0][0]
    if info.log is None:
        raise UserError(f"{info.name} was not submitted to SLURM; its output is in the terminal that started it")
    if not Path(info.log).exists() and not (follow and info.state in ACTIVE):
        raise UserError(
            f"{info.name} has no log yet: it is {info.state}" + (f" ({info.reason})" if info.reason else ""),
            fix=f"cruijff-kit status {folder} shows when it starts; --follow waits for it",
        )
    return runs, info


def read_log(runs: list[RunRef], info: RunInfo, follow: bool) -> Iterator[str]:
    """Yield the log of a run, piece by piece; with `follow` until the run has ended."""
    offset, is_last, decoder = 0, False, codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        has_ended = info.state not in ACTIVE
        log = Path(info.log)
        if log.exists():
            with log.open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            yield decoder.decode(new)
        if not follow or (has_ended and is_last):
            return
        is_last = has_ended  # one more look: a run may print after its state says that it has ended
        time.sleep(2.0)
        info = collect_states(runs)[0][0]


def _show(options: argparse.Namespace) -> dict[str, Any] | None:
    runs, info = find_log(options.folder, options.run, options.follow)
    if options.json:
        text = "".join(read_log(runs, info, options.follow))
        return {"run": info.name, "log": info.log, "lines": text.removesuffix("\n").split("\n") if text else []}
    for text in read_log(runs, info, options.follow):
        sys.stdout.write(text)
        sys.stdout.flush()
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        "logs", "Show the output of a submitted run.", "the run, its log and the lines as one JSON document"
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a sweep's or a run's folder")
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's name, where DIR has several")
    parser.add_argument("--follow", "-f", action="store_true", help="follow the output until the run has ended")
    return parser.run(argv, _show)


if __name__ == "__main__":
    raise SystemExit(main())
