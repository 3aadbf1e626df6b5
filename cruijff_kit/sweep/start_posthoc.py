"""Start post-hoc evaluations: here or on SLURM, where one job evaluates all runs of one base model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.analysis.results_table import record_or_show
from cruijff_kit.analysis.summary import write_overviews
from cruijff_kit.config.run import RunConfig
from cruijff_kit.evaluation.evaluation_grid import EvaluationGrid
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import RunState
from cruijff_kit.records.sweep_manifest import (
    EVALUATE,
    RunEntry,
    create_sweep_manifest,
    edit_sweep_manifest,
    find_sweep_manifests,
    read_sweep_manifest,
)
from cruijff_kit.runs.evaluation_request import EvaluationRequest, base_identity
from cruijff_kit.runs.posthoc_evaluation import EvaluationJobError, evaluate_pending
from cruijff_kit.slurm.request import sbatch_options
from cruijff_kit.slurm.run_states import RunRef, collect_states, find_origin
from cruijff_kit.sweep.on_slurm import print_submitted, reject_remaining
from cruijff_kit.sweep.wait import wait_for
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import say


@dataclass
class PlannedEvaluation:
    """A run, what is to be evaluated, and the run's config with the groups of the request."""

    run: RunRef
    request: EvaluationRequest
    config: RunConfig
    missing: EvaluationGrid | None = None
    """The items that the result lacks; None: not looked for."""


def start_evaluations(where: Path, evaluations: list[PlannedEvaluation]) -> Path | None:
    """Start the evaluations whose requests are in the folders of their runs: submit them, or run them here.

    Args:
        where: the folder whose table is shown at the end.
    Returns:
        `where`, if everything is done; None after a submission that is not waited for.
    Raises:
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1, after the table, if an item failed.
    """
    # Those of one base model in a row: it is read once.
    evaluations = sorted(evaluations, key=lambda e: base_identity(e.config))
    on_slurm = [e for e in evaluations if e.config.slurm.submit]
    if on_slurm:
        _submit(on_slurm)
    failed = _run_here([e for e in evaluations if not e.config.slurm.submit])
    if on_slurm and not on_slurm[0].config.slurm.wait:
        return None
    failed += sum(
        info.state in (RunState.FAILED, RunState.CANCELLED) for info in collect_states([e.run for e in on_slurm])[0]
    )
    if failed:
        print_results(where)
        fix = f"cruijff-kit status {where} shows why; cruijff-kit resume {where} tries again"
        json_output.record(
            error=json_output.describe_error(
                "run", f"the evaluation of {failed} of {len(evaluations)} runs failed", fix, 1
            )
        )
        raise SystemExit(1)
    return where


def _run_here(evaluations: list[PlannedEvaluation]) -> int:
    """Evaluate one run after another; returns how many failed."""
    failed = 0
    for number, evaluation in enumerate(evaluations, 1):
        folder = evaluation.run.folder
        label = f"[{number}/{len(evaluations)}] {folder.name}"
        say(label)
        try:
            evaluate_pending(folder, agent=evaluation.config.agent)
        except EvaluationJobError as error:
            failed += 1
            say(f"{label} failed: {one_line(error)}")
    return failed


def _submit(evaluations: list[PlannedEvaluation]) -> None:
    """Submit, for each manifest, the evaluations of one base model and one request to SLURM as a job or a few."""
    from cruijff_kit.slurm.submit import JobRequest, submit

    by_sweep: dict[Path, dict[str, list[PlannedEvaluation]]] = {}
    for evaluation in evaluations:
        sweep_dir, config = _manifest_folder(evaluation), evaluation.config
        key = json.dumps([base_identity(config), sbatch_options(config)], default=str)
        by_sweep.setdefault(sweep_dir, {}).setdefault(key, []).append(evaluation)
    for sweep_dir, groups in by_sweep.items():
        jobs = []
        for group in groups.values():
            config = group[0].config
            for part in _split_evenly([e.run.folder for e in group], config.slurm.max_parallel or 1):
                jobs.append(JobRequest(part, sbatch_options(config), config.slurm.max_parallel, EVALUATE))
        result = submit(jobs, sweep_dir, read_sweep_manifest(sweep_dir).cwd)
        print_submitted(result, sweep_dir)
        if evaluations[0].config.slurm.wait:
            wait_for(sweep_dir, [run for job in jobs for run in job.runs])
        reject_remaining(result, sweep_dir)


def _split_evenly(folders: list[Path], most: int) -> Iterator[list[Path]]:
    """Split a list into at most `most` parts of like length."""
    number = min(most, len(folders))
    for n in range(number):
        yield folders[n * len(folders) // number : (n + 1) * len(folders) // number]


def _manifest_folder(evaluation: PlannedEvaluation) -> Path:
    """Return the folder of the manifest that has a run; make one in the run's own folder if there is none."""
    ref, config = find_origin(evaluation.run), evaluation.config
    if ref.sweep_dir is not None:
        return ref.sweep_dir
    path = RunFolder(ref.folder).result
    result = read_result(path) if path.exists() else None
    # An evaluation alone is like no run.
    identity = (result.config_hash, result.data_hash) if result else ("", None)
    with edit_sweep_manifest(ref.folder, create_sweep_manifest(config.experiment, sys.argv[1:])) as manifest:
        manifest.runs.append(RunEntry(config.run_name, ".", *identity))
    return ref.folder


def print_results(where: Path) -> None:
    """Bring each results.csv up to date and print the table (or record the results)."""
    above = [folder for folder in (where, *[*where.absolute().parents][:2]) if (folder / "results.csv").exists()]
    for folder in dict.fromkeys(p.absolute() for p in (*find_sweep_manifests(where), *above)):
        write_overviews(folder)
    record_or_show(where)
