"""slurm.wait=true: stay with the submitted runs until they have ended."""

from pathlib import Path

from cruijff_kit.analysis.status_table import none_active, watch
from cruijff_kit.records.run_status import ACTIVE
from cruijff_kit.slurm.cancel import cancel_jobs
from cruijff_kit.slurm.run_states import collect_states, find_runs
from cruijff_kit.util import json_output
from cruijff_kit.util.progress import say


def wait_for(sweep_dir: Path, folders: list[Path]) -> None:
    """Show how the runs do until all have ended.

    Raises:
        KeyboardInterrupt: on Ctrl-C; asked in a terminal, the jobs are cancelled or left; without one they are left.
    """
    wanted = set(folders)
    runs = [k for k in find_runs(sweep_dir) if k.folder in wanted]
    try:
        watch(str(sweep_dir), runs, none_active)
    except KeyboardInterrupt:
        active = [(k, v) for k, v in zip(runs, collect_states(runs)[0], strict=True) if v.state in ACTIVE and v.job_id]
        if active and _asked_to_cancel(len(active)):
            cancel_jobs(active)
            say(f"{len(active)} runs cancelled")
        elif active:
            say(f"{len(active)} runs go on without us: cruijff-kit status {sweep_dir} --watch")
        raise


def _asked_to_cancel(count: int) -> bool:
    if not json_output.at_terminal():
        return False
    try:
        return json_output.agreed(f"\ncancel the {count} runs that are queued or running?")
    except KeyboardInterrupt:
        return False
