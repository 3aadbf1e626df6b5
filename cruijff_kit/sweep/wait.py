"""slurm.wait=true: wait until the submitted runs have ended."""

from pathlib import Path

from cruijff_kit.analysis.status_table import have_ended, watch
from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.cancel import cancel_jobs
from cruijff_kit.slurm.run_states import collect_states, find_runs
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say


def wait_for(sweep_dir: Path, folders: list[Path]) -> None:
    """Show the state of runs until all have ended.

    Raises:
        KeyboardInterrupt: on Ctrl-C. At a terminal it asks whether to cancel the jobs; without one they continue.
    """
    folder_set = set(folders)
    runs = [ref for ref in find_runs(sweep_dir) if ref.folder in folder_set]
    try:
        watch(str(sweep_dir), runs, have_ended)
    except KeyboardInterrupt:
        states = zip(runs, collect_states(runs)[0], strict=True)
        active = [(ref, info) for ref, info in states if info.state in ACTIVE and info.job_id]
        if active and _confirm_cancel(len(active)):
            cancel_jobs(active)
            say(f"{len(active)} runs cancelled")
        elif active:
            say(f"{len(active)} runs continue: cruijff-kit status {sweep_dir} --watch")
        raise


def _confirm_cancel(count: int) -> bool:
    if not json_output.is_tty():
        return False
    try:
        return json_output.confirm(f"\ncancel the {count} runs that are queued or running?")
    except KeyboardInterrupt:
        return False
