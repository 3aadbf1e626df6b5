"""Cancel submitted runs: `cruijff-kit cancel DIR [RUN ...] [--yes] [--json]`.

A run that is training saves its state first; `cruijff-kit resume DIR` continues from it. At a terminal it asks for
confirmation, with --json never. --json: {"cancelled": [{"name", "folder", "job_id"}]}.
"""

import argparse
from pathlib import Path

from cruijff_kit.analysis.summary import write_summary
from cruijff_kit.commands.base import Parser
from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.cancel import cancel_jobs
from cruijff_kit.slurm.run_states import RunInfo, collect_states, find_runs, select_runs
from cruijff_kit.util import errors, json_output
from cruijff_kit.util.errors import UserError


def cancel(folder: Path, names: list[str], is_confirmed: bool) -> list[RunInfo]:
    """Cancel the runs of these names (none: all) that are queued or running; returns those that were cancelled.

    Args:
        is_confirmed: do not ask.
    Raises:
        UserError: no such run; or it is not confirmed, and there is no terminal to ask at.
        ClusterError: SLURM does not answer.
    """
    runs = select_runs(find_runs(folder), names)
    infos, trouble = collect_states(runs)
    if trouble:
        raise errors.ClusterError(trouble)
    active = [(ref, info) for ref, info in zip(runs, infos, strict=True) if info.state in ACTIVE]
    local = [info for _, info in active if info.job_id is None]
    submitted = [(ref, info) for ref, info in active if info.job_id is not None]
    if local:
        raise UserError(f"{local[0].name} runs on this machine, not on SLURM: press Ctrl-C where it was started")
    if not submitted:
        print("nothing to cancel: no run is queued or running")
        return []
    if not is_confirmed and not _confirm([info for _, info in submitted]):
        print("nothing was cancelled")
        return []
    cancel_jobs(submitted)
    for sweep_dir in {ref.sweep_dir for ref, _ in submitted if ref.sweep_dir is not None}:
        write_summary(sweep_dir)
    print(f"{len(submitted)} run{'s' * (len(submitted) != 1)} cancelled; cruijff-kit resume {folder} continues")
    return [info for _, info in submitted]


def _confirm(infos: list[RunInfo]) -> bool:
    names = ", ".join(info.name for info in infos[:5]) + (", ..." if len(infos) > 5 else "")
    if not json_output.is_tty():
        raise UserError(f"{len(infos)} runs would be cancelled ({names}); add --yes")
    return json_output.confirm(f"cancel {len(infos)} runs ({names})?")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser("cancel", "Cancel submitted runs.", "which runs were cancelled, as one JSON document")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a sweep's or a run's folder")
    parser.add_argument("runs", metavar="RUN", nargs="*", help="names of runs; none: all of them")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask for confirmation")

    def command(options: argparse.Namespace) -> dict[str, list[dict[str, str | None]]]:
        infos = cancel(options.folder, options.runs, options.yes)
        return {"cancelled": [{"name": info.name, "folder": info.folder, "job_id": info.job_id} for info in infos]}

    return parser.run(argv, command)


if __name__ == "__main__":
    raise SystemExit(main())
