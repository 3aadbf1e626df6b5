"""Go on with what is not done: `cruijff-kit resume DIR [slurm.KEY=VALUE ...]`.

DIR is a run, a sweep, or a folder above them. Each run that is neither done nor on its way resumes from its newest
checkpoint, or starts if it has none, with its saved configuration: on SLURM if it was submitted, here if it ran here. Only
the slurm group may be changed: slurm.time=04:00:00, slurm.submit=false to run here.
--json: {"folder", "to_finish", "active", "submitted", "made", "runs": as of `table --json`, "states"}.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.results_frame import make_empty_dict
from cruijff_kit.analysis.summary import refresh_sweep_summary, write_overviews, write_summary
from cruijff_kit.commands.base import Parser
from cruijff_kit.config import data_policy
from cruijff_kit.config.explain import explain_errors
from cruijff_kit.config.keys import describe_unknown_key, valid_keys
from cruijff_kit.config.overrides import parse_overrides
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records import failures
from cruijff_kit.records.run_status import ACTIVE, RunState
from cruijff_kit.records.saved_config import allow_sensitive, load_saved_config, load_swept
from cruijff_kit.records.sweep_manifest import RESUME, read_sweep_manifest
from cruijff_kit.runs.evaluation_request import read_request, write_request
from cruijff_kit.runs.multi_lora_runs import GroupRun, plan_groups, run_group
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.slurm.request import double_memory
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs
from cruijff_kit.sweep.finish import print_summary
from cruijff_kit.sweep.on_slurm import print_submitted, reject_remaining
from cruijff_kit.sweep.slurm_jobs import make_job_requests
from cruijff_kit.sweep.start_posthoc import PlannedEvaluation, print_results, start_evaluations
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError, UserError, one_line
from cruijff_kit.util.progress import say


def resume(folder: Path, overrides: list[str]) -> None:
    """Finish the runs below a folder: submit them, or run them here and show the table.

    Raises:
        UserError: no run there, or one that cannot go on.
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1, after the table, if a run failed again.
    """
    changes = _parse(overrides)
    runs = find_runs(folder)
    infos, trouble = collect_states(runs)
    if trouble and any(info.state in ACTIVE and info.job_id for info in infos):
        raise ClusterError(f"cannot determine whether the submitted runs are still active: {trouble}")
    active = [info for info in infos if info.state in ACTIVE]
    left = [(ref, info) for ref, info in zip(runs, infos, strict=True) if info.state not in (RunState.DONE, *ACTIVE)]
    text = f"{len(left)} runs to finish" if left else "nothing to finish" if active else "every run is done"
    say(text + (f"; {len(active)} active" if active else ""))
    json_output.record(to_finish=[info.name for _, info in left], active=[info.name for info in active])
    json_output.record(folder=str(folder.absolute()), submitted=[], made=[], **make_empty_dict())
    try:
        _finish(folder, left, changes)
    finally:
        if json_output.is_enabled():
            json_output.record(states=_state_rows(find_runs(folder)))


def _state_rows(runs: list[RunRef]) -> list[dict[str, Any]]:
    keys = ("name", "folder", "state", "reason", "job_id")
    return [{key: getattr(info, key) for key in keys} for info in collect_states(runs)[0]]


@dataclass
class _Changes:
    """Changes that the command line requests."""

    slurm: dict[str, Any]
    """Settings of the slurm group."""
    caller: dict[str, Any]
    """agent and dataset.permission: who gives the command, and who permitted it."""

    def check_access(self, run: Path, config: RunConfig) -> RunConfig:
        """Return a run's config with the caller. Raises UserError as data_policy.check_access."""
        config.agent = self.caller.get("agent")
        config.dataset.permission = self.caller.get("dataset.permission", config.dataset.permission)
        try:
            data_policy.check_access(config)
        except UserError as error:
            raise UserError(f"{run}: {error}") from error
        return config

    def save_permission(self, runs: Iterable[Path]) -> None:
        """Write the permission into the configs of runs, if one was typed."""
        if "dataset.permission" in self.caller:
            for run in runs:
                allow_sensitive(run, self.caller["dataset.permission"])


def _parse(overrides: list[str]) -> _Changes:
    changes, valid = _Changes({}, {}), valid_keys()
    with explain_errors():
        for override in parse_overrides(overrides):
            key = override.key_or_group
            if key in ("agent", "dataset.permission"):
                changes.caller[key] = override.value()
                continue
            if not key.startswith("slurm."):
                raise UserError(f"{key} cannot change in a run that has begun, only slurm.* can; start a new run")
            if key not in valid and not key.startswith("slurm.additional_parameters."):
                raise UserError(describe_unknown_key(key))
            changes.slurm[key.removeprefix("slurm.")] = override.value()
    return changes


def _finish(folder: Path, left: list[tuple[RunRef, RunInfo]], changes: _Changes) -> None:
    to_evaluate = [(ref, info) for ref, info in left if read_request(ref.folder)]
    left = [pair for pair in left if pair not in to_evaluate]
    if to_evaluate:
        _evaluate(folder, to_evaluate, changes)
        if not left:
            return
    configs = {
        ref.folder: changes.check_access(ref.folder, load_saved_config(ref.folder, changes.slurm)) for ref, _ in left
    }
    changes.save_permission(configs)
    by_sweep: dict[Path, list[tuple[RunRef, RunInfo]]] = {}
    for ref, info in left:
        if configs[ref.folder].slurm.submit:
            by_sweep.setdefault(ref.sweep_dir or ref.folder, []).append((ref, info))
    for sweep_dir, runs in by_sweep.items():
        _submit(sweep_dir, runs, configs)
    local = [ref for ref, _ in left if not configs[ref.folder].slurm.submit]
    if local or not left:
        _run_here(folder, local, configs)


def _evaluate(folder: Path, runs: list[tuple[RunRef, RunInfo]], changes: _Changes) -> None:
    """Go on with the post-hoc evaluations that the runs wait for."""
    for ref, _ in runs:
        changes.check_access(ref.folder, read_request(ref.folder).config(ref.folder))
    changes.save_permission([ref.folder for ref, _ in runs])
    evaluations = []
    for ref, info in runs:
        request = read_request(ref.folder)
        mem = _more_memory(info, request.slurm["mem"])
        request.slurm |= ({"mem": mem} if mem else {}) | changes.slurm
        write_request(ref.folder, request)
        evaluations.append(PlannedEvaluation(ref, request, request.config(ref.folder, changes.caller.get("agent"))))
    if start_evaluations(folder, evaluations) is not None:
        print_results(folder)


def _submit(sweep_dir: Path, runs: list[tuple[RunRef, RunInfo]], configs: dict[Path, RunConfig]) -> None:
    from cruijff_kit.slurm.submit import submit

    changes = {ref.folder: _memory_change(info, configs[ref.folder]) for ref, info in runs}
    by_memory: dict[str | None, list[Path]] = {}  # the runs of a job ask for the same
    for ref, info in runs:
        by_memory.setdefault((info.changes | changes[ref.folder]).get("slurm.mem"), []).append(ref.folder)
    jobs = []
    for mem, folders in by_memory.items():
        for job in make_job_requests([configs[f] for f in folders], folders, [None] * len(folders)):
            job.options |= {"mem": mem} if mem else {}
            job.reason, job.changes = RESUME, changes[job.runs[0]]
            jobs.append(job)
    result = submit(jobs, sweep_dir, read_sweep_manifest(sweep_dir).cwd)
    print_submitted(result, sweep_dir)
    write_summary(sweep_dir)
    reject_remaining(result, sweep_dir)


def _memory_change(info: RunInfo, config: RunConfig) -> dict[str, Any]:
    mem = _more_memory(info, info.changes.get("slurm.mem") or config.slurm.mem)
    return {"slurm.mem": mem} if mem else {}


def _more_memory(info: RunInfo, mem: str | None) -> str | None:
    """Return twice the memory for a run that failed out of memory; None for any other run."""
    return double_memory(mem, None) if info.cause == failures.OUT_OF_MEMORY else None


def _run_here(folder: Path, runs: list[RunRef], configs: dict[Path, RunConfig]) -> None:
    folders = [ref.folder for ref in runs]
    try:
        for group in plan_groups([configs[run] for run in folders]):
            if len(group.runs) > 1:
                say(group.summary(len(runs)))
                members = [
                    GroupRun(configs[folders[n]], load_swept(folders[n]), f"[{n + 1}/{len(runs)}] ") for n in group.runs
                ]
                run_group(members, group.at_once)
            else:
                _run_single(folders[group.runs[0]], configs, f"[{group.runs[0] + 1}/{len(runs)}]")
    finally:
        interrupted = sys.exc_info()[0] is not None
        sweeps = {ref.sweep_dir for ref in runs if ref.sweep_dir} - {folder.absolute()}
        for sweep_dir in () if interrupted else sweeps:
            write_overviews(sweep_dir)
        try:
            print_summary(folder)
        except SystemExit:
            if not interrupted:
                raise


def _run_single(run: Path, configs: dict[Path, RunConfig], label: str) -> None:
    say(f"{label} {run.name}")
    try:
        train_then_eval(configs[run], load_swept(run))
    except Exception as error:
        say(f"{label} {run.name} failed: {one_line(error)}")
    refresh_sweep_summary(run)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser("resume", "Finish the unfinished runs.", "what was submitted or run, as one JSON document")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run's or a sweep's folder, or one above")
    parser.add_argument("overrides", metavar="slurm.KEY=VALUE", nargs="*", help="a new request to the cluster")
    return parser.run(argv, lambda options: resume(options.folder, options.overrides))


if __name__ == "__main__":
    raise SystemExit(main())
